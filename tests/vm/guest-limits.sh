#!/usr/bin/env bash
# In the guest: a device with a limit keeps to it, and requests that it holds outlive their daemon.
# usage: guest-limits.sh DIRECTORY
dir=$1
state=/mnt/state cache=/mnt/cache cache_size=128MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"

start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 64MiB --iops 500
quarry volume attach "$volume" --via ublk
disk=$(await_device)

fio=(fio --ioengine=libaio --direct=1 --filename="$disk" --size=64m --iodepth=32 --minimal --eta=never --output=/mnt/fio.out --name=a)
# What comes at once at the start is not counted. More than the limit is never right; less can be this machine's, which is
# one of several on a busy host, so that is judged in three windows.
measure() {
    local iops
    for _ in 1 2 3; do
        "${fio[@]}" --rw=randread --bs=4k --io_size=100g --runtime=5 --ramp_time=1 --time_based || { cat /mnt/fio.out >&2; fail "fio"; }
        iops=$(grep '^3;' /mnt/fio.out | cut -d';' -f8)
        say "$1 IOPS: $iops"
        ((iops * 100 < $1 * 105)) || fail "$iops IOPS at a limit of $1"
        if ((iops * 100 > $1 * 95)); then return; fi
    done
    fail "$iops IOPS at a limit of $1, and no more in three windows"
}
measure 500
quarry volume limit "$volume" --iops 2000
measure 2000

quarry volume limit "$volume" --iops 200
"${fio[@]}" --rw=randrw --bsrange=512-64k --verify=crc32c --verify_fatal=1 --verify_state_save=0 --io_size=100g --runtime=1h --time_based \
    --verify_backlog=64 &
load=$!
sleep 2
held=
for _ in $(seq 100); do
    if [[ $(quarry volume show "$volume" --output json) =~ \"held\":\ *[1-9] ]]; then
        held=yes
        break
    fi
    sleep 0.1
done
[[ $held ]] || fail "nothing is held"
replace_daemon
sleep 2
kill_daemon
start_daemon
sleep 2
kill -INT "$load"
wait "$load" || [[ $? == 128 ]] || fail "fio ended badly"
[[ $(grep '^3;' /mnt/fio.out | cut -d';' -f5) == 0 ]] || { cat /mnt/fio.out >&2; fail "an error or wrong data"; }
quarry volume detach "$volume"
stop_daemon
say "passed"
