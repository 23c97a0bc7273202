#!/usr/bin/env bash
# In the guest: devices that a dead daemon left. Those that are wanted come back, those that nobody wants any more go,
# another daemon's are left alone; and a device that copies its data does all that one without copies does.
# usage: guest-devices.sh DIRECTORY
dir=$1
state=/mnt/state cache=/mnt/cache cache_size=128MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"

node() { readlink -f "/dev/quarry/acme/$1"; }
counter() { # METRIC VOLUME
    busybox wget -q -O - http://127.0.0.1:9400/metrics |
        awk -v m="$1{" -v v="volume=\"$2\"" 'index($0, m) == 1 && index($0, v) { print $2 }'
}

start_daemon
quarry tenant create acme
for name in kept unlisted deleted; do
    quarry volume create "acme/$name" --size 64MiB
    quarry volume attach "acme/$name" --via ublk
done
kept=$(node kept) unlisted=$(node unlisted) deleted=$(node deleted)
# Less than a chunk, so that it is still unsent when the daemon dies, and a hit afterwards.
dd if=/dev/urandom of=/mnt/data bs=1M count=4 status=none
for device in "$kept" "$unlisted" "$deleted"; do
    dd if=/mnt/data of="$device" bs=1M oflag=direct conv=notrunc status=none || fail "write to $device"
done
kill_daemon
# Meanwhile one volume is deleted elsewhere, and of another nobody has noted that it is attached.
rm "$dir/store/t/acme/names/deleted"
sed -i 's/"acme\/unlisted":{[^}]*},\{0,1\}//; s/,}/}/' "$state/attached.json"
timeout 60 dd if="$deleted" of=/dev/null bs=4096 count=1 iflag=direct status=none 2>/mnt/reader &
reader=$!

# Another daemon on this host has no business with these devices.
state=/mnt/state2 cache=/mnt/cache2 QUARRY_SOCKET=/run/other.sock start_daemon
[[ -b $kept && -b $unlisted && -b $deleted ]] || fail "another daemon's devices were touched"
stop_daemon
kill -0 "$reader" || fail "a reader of a device without a daemon was not kept waiting"

start_daemon
for _ in $(seq 100); do
    [[ ! -e $unlisted && ! -e $deleted ]] && break
    sleep 0.1
done
[[ ! -e $unlisted && ! -e $deleted ]] || fail "devices that nobody wants are still there"
[[ ! -e /dev/quarry/acme/unlisted && ! -e /dev/quarry/acme/deleted ]] || fail "their names are still there"
wait "$reader" && fail "a read of a deleted volume succeeded"
cmp -n 4194304 /mnt/data "$kept" || fail "the device that is wanted has lost its data"
[[ $(counter quarry_volume_copied_bytes_total kept) == 0 ]] || fail "hits of a zero-copy device were copied"
quarry volume attach acme/unlisted --via ublk
cmp -n 4194304 /mnt/data "$(node unlisted)" || fail "the unlisted volume has lost its data"
# Somebody who has a device open waits for nothing, nor does its detach for him; what others wrote to its page cache
# is the volume's.
exec 9<"$(node kept)"
dd if=/dev/urandom of=/mnt/unsynced bs=64k count=16 status=none
dd if=/mnt/unsynced of="$(node kept)" bs=64k seek=512 conv=notrunc status=none
timeout 20 "$QUARRY_BIN" volume detach acme/kept || fail "a detach waits for somebody who has the device open"
exec 9<&-
quarry volume attach acme/kept --via ublk
cmp -n 1048576 /mnt/unsynced "$(node kept)" 0 33554432 || fail "what was in the page cache is lost"
for name in kept unlisted; do
    quarry volume detach "acme/$name"
done

# The same in the other modes, each forced: what the device is told to have, what the metrics say, and all data right
# through verified I/O, a kill, and a replacement.
copied() { counter quarry_volume_copied_bytes_total kept; }
stop_daemon
export QUARRY_CONFIG=/mnt/quarry.toml
for mode in zero-copy-by-hand user-copy plain; do
    words=${mode//-/ }
    printf '[ublk]\nmode = "%s"\n' "$mode" >/mnt/quarry.toml
    start_daemon
    quarry volume attach acme/kept --via ublk
    [[ $(quarry volume show acme/kept --output json) == *"\"$words\""* ]] || fail "$mode: not shown"
    busybox wget -q -O - http://127.0.0.1:9400/metrics | grep -q "^quarry_volume_info{.*mode=\"$words\"" || fail "$mode: wrong metric"
    # The first time from the store, for it was detached; then from the cache.
    cmp -n 4194304 /mnt/data "$(node kept)" || fail "$mode: other data"
    before=$(copied)
    fio --name="$mode" --filename="$(node kept)" --offset=8m --ioengine=libaio --direct=1 --rw=randrw --bsrange=512-1m --iodepth=32 --size=48m \
        --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal --eta=never --output=/mnt/fio.out ||
        { cat /mnt/fio.out >&2; fail "$mode: fio"; }
    blkdiscard -z -o 0 -l 1048576 "$(node kept)" || fail "$mode: write zeroes"
    cmp -n 1048576 /dev/zero "$(node kept)" || fail "$mode: zeroes are not"
    dd if=/mnt/data of="$(node kept)" bs=64k count=16 oflag=direct conv=notrunc status=none || fail "$mode: dd"
    if [[ $mode == zero-copy* ]]; then
        (($(copied) == before)) || fail "$mode: data were copied"
    else
        (($(copied) - before > 48 << 20)) || fail "$mode: copies are not counted"
    fi
    fio --name=load --filename="$(node kept)" --offset=8m --ioengine=libaio --direct=1 --rw=randrw --bsrange=4k-256k --iodepth=32 --size=48m \
        --verify=crc32c --verify_backlog=64 --verify_fatal=1 --verify_state_save=0 --io_size=100g --runtime=1h --time_based \
        --minimal --eta=never --output=/mnt/fio.out &
    load=$!
    sleep 1
    kill_daemon
    start_daemon
    sleep 1
    stop_daemon
    start_daemon
    sleep 1
    kill -INT "$load"
    wait "$load" || [[ $? == 128 ]] || fail "$mode: fio ended badly"
    [[ $(grep '^3;' /mnt/fio.out | cut -d';' -f5) == 0 ]] || { cat /mnt/fio.out >&2; fail "$mode: an error or wrong data over a kill"; }
    cmp -n 4194304 /mnt/data "$(node kept)" || fail "$mode: other data after a kill"
    quarry volume detach acme/kept
    stop_daemon
    say "$mode: passed"
done
say "passed"
