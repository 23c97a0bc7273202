#!/usr/bin/env bash
# In a guest of two CPUs: a device of two queues, both in use, over a kill and a replacement.
# usage: guest-queues.sh DIRECTORY
dir=$1
state=/mnt/state cache=/mnt/cache cache_size=256MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"

[[ $(nproc) == 2 ]] || fail "this guest has not two CPUs"
start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 128MiB
# The kernel gives a device no more queues than there are CPUs.
quarry volume attach "$volume" --via ublk --queues 4
disk=$(await_device)
[[ $(ls "/sys/block/${disk#/dev/}/mq" | wc -w) == 2 ]] || fail "the device has not two queues"
[[ $(quarry volume show "$volume") == *"2 queues"* ]] || fail "the queues are not shown"

# Two jobs, each on a CPU and so on a queue of its own, and each on its own half.
verified=(--ioengine=libaio --direct=1 --filename="$disk" --size=64m --iodepth=32 --minimal --eta=never --output=/mnt/fio.out
    --rw=randrw --bsrange=512-128k --verify=crc32c --verify_fatal=1 --verify_state_save=0)
jobs=(--name=a --cpus_allowed=0 --name=b --cpus_allowed=1 --offset=64m)
fio "${verified[@]}" "${jobs[@]}" || { cat /mnt/fio.out >&2; fail "fio"; }
fio "${verified[@]}" --io_size=100g --runtime=1h --time_based --verify_backlog=64 "${jobs[@]}" &
fio=$!
sleep 2
kill_daemon
start_daemon
sleep 1
replace_daemon
sleep 1
kill -INT "$fio"
wait "$fio" || [[ $? == 128 ]] || fail "fio ended badly"
[[ $(grep -c '^3;' /mnt/fio.out) == 2 ]] || fail "not both jobs reported"
for errors in $(grep '^3;' /mnt/fio.out | cut -d';' -f5); do
    [[ $errors == 0 ]] || { cat /mnt/fio.out >&2; fail "an error or wrong data"; }
done
[[ $(quarry volume show "$volume") == *"2 queues"* ]] || fail "the queues are not shown after a kill"
quarry volume detach "$volume"
stop_daemon
say "passed"
