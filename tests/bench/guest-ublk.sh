#!/usr/bin/env bash
# In the guest: fio on a Quarry volume by ublk beside rublk's loop target with zero copy, on files of one tmpfs, in turns.
# Prints one line a run: WORK TARGET ROUND IOPS.
# usage: guest-ublk.sh DIRECTORY ROUNDS SECONDS
dir=$1 rounds=$2 seconds=$3
state=/mnt/state cache=/mnt/cache cache_size=1536MiB
# shellcheck source=../vm/guest.sh
source "$(dirname "$0")/../vm/guest.sh"
size=256m

fio_iops() { # DEVICE OPTIONS...: operations a second
    local device=$1
    shift
    fio --name=b --filename="$device" --ioengine=io_uring --direct=1 --size=$size --runtime="$seconds" --time_based \
        --randrepeat=0 --norandommap --minimal --eta=never "$@" | awk -F';' '/^3;/ { print $8 + $49 }'
}

cat >/mnt/quarry.toml <<TOML
[writeback]
# No upload in a measurement: the work is the cache's.
delay = "1h"
[reactor]
threads = 1
TOML
export QUARRY_CONFIG=/mnt/quarry.toml
start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 256MiB
quarry volume attach "$volume" --via ublk
mine=$(await_device)
truncate -s 256M /mnt/back
rublk add loop -f /mnt/back -q 1 -d 128 -z >&2 || fail "rublk"
for _ in $(seq 100); do
    theirs=$(ls /dev/ublkb* | grep -v "^$mine\$" | head -n 1)
    [[ -b $theirs ]] && break
    sleep 0.1
done
say "Quarry is $mine, rublk is $theirs"
for device in "$mine" "$theirs"; do
    fio --name=fill --filename="$device" --ioengine=io_uring --direct=1 --size=$size --rw=write --bs=1m --iodepth=4 \
        --minimal --eta=never --output=/dev/null
done

for round in $(seq "$rounds"); do
    for work in randread:4k:1 randread:4k:32 randread:4k:128 randwrite:4k:1 randwrite:4k:32 randwrite:4k:128 \
        randread:64k:32 randwrite:64k:32 randread:512k:8 randwrite:512k:8; do
        IFS=: read -r kind block depth <<<"$work"
        for target in quarry rublk; do
            device=$mine
            [[ $target == rublk ]] && device=$theirs
            iops=$(fio_iops "$device" --rw="$kind" --bs="$block" --iodepth="$depth")
            echo "$work $target $round $iops"
        done
        # Everything unsent goes out between the runs, so that each finds the cache as empty as the others.
        quarry volume sync "$volume" >/dev/null
    done
done
shown=$(quarry volume show "$volume" --output json)
[[ $shown =~ \"copied_bytes\":\ *([0-9]+) ]] && echo "copied_bytes ${BASH_REMATCH[1]}"
[[ $shown =~ \"mode\":\ *\"([a-z ]+)\" ]] && echo "mode ${BASH_REMATCH[1]}"
rublk del --all >&2 || true
quarry volume detach "$volume" >&2
kill "$daemon"
wait "$daemon"
