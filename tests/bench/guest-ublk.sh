#!/usr/bin/env bash
# In the guest: fio on a Quarry volume by ublk beside rublk's loop target with zero copy, on files of one tmpfs, in turns; and
# reads of 4 KiB beside the same of another volume by NBD. Prints one line a run: WORK TARGET ROUND IOPS; and for reads: switches WORK CONTEXT_SWITCHES_OF_THE_REACTOR_A_READ.
# usage: guest-ublk.sh DIRECTORY ROUNDS SECONDS
dir=$1 rounds=$2 seconds=$3
# Small enough to be as warm in the CPU's caches as rublk's file, large enough for what is unsent. Without compression:
# the one chunk that is made while writes are measured would cost the one CPU as much as thousands of writes.
state=/mnt/state cache=/mnt/cache cache_size=960MiB
# shellcheck source=../vm/guest.sh
source "$(dirname "$0")/../vm/guest.sh"
size=256m

# OPTIONS...: operations a second. Random reads for a time, random writes once over the device.
fio_iops() {
    fio --name=b --ioengine=io_uring --direct=1 --size=$size --randrepeat=0 --minimal --eta=never "$@" |
        awk -F';' '/^3;/ { print $8 + $49 }'
}

# Context switches of the daemon's reactor so far.
switches() {
    cat /proc/"$daemon"/task/*/status |
        awk '/^Name:/ { mine = $2 ~ /^reactor/ } /ctxt_switches/ && mine { n += $2 } END { print n }'
}

# By fio's own NBD client, as all else here by fio.
nbd_iops() {
    fio_iops --ioengine=nbd --uri="$by_nbd" "$@"
}

# Both devices written from end to end, so that each is laid out in order.
fill() {
    for device in "$mine" "$theirs"; do
        fio --name=fill --filename="$device" --ioengine=io_uring --direct=1 --size=$size --rw=write --bs=1m --iodepth=4 \
            --minimal --eta=never --output=/dev/null
    done
    quarry volume sync "$volume" >/dev/null 2>&1
}

cat >/mnt/quarry.toml <<TOML
[writeback]
delay = "1h"
uploads_max = 1
[reactor]
threads = 1
TOML
export QUARRY_CONFIG=/mnt/quarry.toml
start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 256MiB --compression none
quarry volume attach "$volume" --via ublk
mine=$(await_device)
truncate -s 256M /mnt/back
rublk add loop -f /mnt/back -q 1 -d 128 -z >&2 || fail "rublk"
for _ in $(seq 100); do
    theirs=$(ls /dev/ublkb* | grep -v "^$mine\$" | head -n 1)
    [[ -b $theirs ]] && break
    sleep 0.1
done
quarry volume create acme/nbd --size 256MiB --compression none
by_nbd=$(quarry volume attach acme/nbd --via nbd)
nbd_iops --rw=write --bs=1m --iodepth=4 >/dev/null
quarry volume sync acme/nbd >/dev/null
say "Quarry is $mine, rublk is $theirs"
# Quarry takes the scheduler from its devices by itself, which is worth a good deal: here both go without.
echo none >"/sys/block/${theirs#/dev/}/queue/scheduler"

for round in $(seq "$rounds"); do
    for work in ${QUARRY_BENCH_WORK:-randread:4k:1 randread:4k:32 randread:4k:128 randread:64k:32 randread:512k:8 \
        randwrite:4k:1 randwrite:4k:32 randwrite:4k:128 randwrite:64k:32 randwrite:512k:8}; do
        IFS=: read -r kind block depth <<<"$work"
        [[ $work == randread:4k:1 || $kind == randwrite ]] && fill
        length=(--runtime="$seconds" --time_based --norandommap)
        # A write costs the same whatever the store does later; that comes after the measurement.
        [[ $kind == randwrite ]] && { length=(--io_size=$size); mv "$dir/store" "$dir/store.away"; }
        for target in quarry rublk; do
            device=$mine
            [[ $target == rublk ]] && device=$theirs
            before=$(switches)
            iops=$(fio_iops --filename="$device" --rw="$kind" --bs="$block" --iodepth="$depth" "${length[@]}")
            echo "$work $target $round $iops"
            [[ $target == quarry && $kind == randread ]] &&
                awk -v w="$work" -v n=$(($(switches) - before)) -v o="$iops" -v s="$seconds" 'BEGIN { print "switches", w, n / (o * s) }'
        done
        [[ $kind == randwrite ]] && mv "$dir/store.away" "$dir/store"
        [[ $kind:$block == randread:4k ]] &&
            echo "$work nbd $round $(nbd_iops --rw=randread --bs=4k --iodepth="$depth" "${length[@]}")"
    done
done
shown=$(quarry volume show "$volume" --output json)
[[ $shown =~ \"copied_bytes\":\ *([0-9]+) ]] && echo "copied_bytes ${BASH_REMATCH[1]}"
[[ $shown =~ \"mode\":\ *\"([a-z ]+)\" ]] && echo "mode ${BASH_REMATCH[1]}"
rublk del -n "${theirs#/dev/ublkb}" >&2 || true
quarry volume detach "$volume" >/dev/null 2>&1
stop_daemon
