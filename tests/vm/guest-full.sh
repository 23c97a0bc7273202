#!/usr/bin/env bash
# In the guest: file systems without room, under the cache, the list of attached volumes, the journals, and what is told to
# udev. What cannot be is refused with words and undone, and volumes that are attached notice nothing.
# usage: guest-full.sh DIRECTORY
dir=$1
state=/mnt/state cache=/mnt/cache cache_size=64MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"

small() { mkdir -p "$1" && mount -t tmpfs -o "size=$2,mode=700" tmpfs "$1"; }
fill() { # DIRECTORY: not a byte is left
    dd if=/dev/zero of="$1/ballast" bs=4k status=none 2>/dev/null && fail "$1 is not full"
    true
}
node() { readlink -f "/dev/quarry/acme/$1"; }
works() {
    kill -0 "$fio" 2>/dev/null || { cat /mnt/fio.out >&2; fail "fio saw an error or wrong data $1"; }
}
# What attaching acme/b is refused with, and that nothing is left of it.
refused() { # TEXT
    local said shown devices
    devices=$(echo /dev/ublkb*)
    said=$("$QUARRY_BIN" volume attach acme/b --via ublk 2>&1) && fail "attached without room"
    [[ $said == *"$1"* ]] || fail "refused with: $said"
    [[ $said == *"No space left on device"* ]] || fail "the reason is missing: $said"
    shown=$("$QUARRY_BIN" volume show acme/b)
    [[ $shown =~ state\ +detached ]] || fail "not undone: $shown"
    [[ $shown =~ owner ]] && fail "it still has an owner: $shown"
    [[ $(echo /dev/ublkb*) == "$devices" ]] || fail "a device is left: $(echo /dev/ublkb*)"
    [[ ! -L /dev/quarry/acme/b ]] || fail "a link is left"
    works "when another was refused"
}
attached_now() {
    quarry volume attach acme/b --via ublk
    dd if=/mnt/data of="$(node b)" bs=1M oflag=direct conv=notrunc,fsync status=none || fail "write"
    cmp -n 1048576 /mnt/data "$(node b)" || fail "other data"
    quarry volume detach acme/b
}

# A cache that its file system has no room for, new, or made beforehand with holes.
small /mnt/small 40m
for made in no yes; do
    if [[ $made == yes ]]; then truncate -s 64M /mnt/small/cache; fi
    "$QUARRY_BIN" serve --data-dir "$state" --store "file://$dir/store" --cache /mnt/small/cache --cache-size 64MiB \
        --socket /run/other.sock >/mnt/said 2>&1 && fail "a daemon serves without room for its cache"
    grep -q "cannot allocate the cache /mnt/small/cache: No space left on device (os error 28); free space there or make the cache smaller" /mnt/said ||
        fail "said: $(cat /mnt/said)"
    (($(df --output=avail -k /mnt/small | tail -n 1) > 39000)) || fail "the room that there was is gone"
done

export QUARRY_CONFIG=/mnt/quarry.toml
printf '[daemon]\njournal_dir = "/mnt/journal"\n' >"$QUARRY_CONFIG"
small "$state" 1m
small /mnt/journal 1m
start_daemon
quarry tenant create acme
for name in a b; do quarry volume create "acme/$name" --size 64MiB; done
quarry volume attach acme/a --via ublk
a=$(node a)
dd if=/dev/urandom of=/mnt/data bs=1M count=1 status=none
fio --name=a --filename="$a" --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=8 --size=64m \
    --io_size=100g --verify=crc32c --verify_backlog=256 --verify_fatal=1 --verify_state_save=0 --runtime=1h --time_based \
    --fsync=64 --minimal --eta=never --output=/mnt/fio.out >&2 &
fio=$!

fill "$state"
refused "acme/b cannot be noted"
rm "$state/ballast"
attached_now
fill /mnt/journal
refused "the journal in /mnt/journal cannot be made"
# The index table is no volume's.
journals() { ls --ignore=index /mnt/journal/*/; }
[[ $(journals | wc -l) == 1 ]] || fail "left of a journal: $(journals)"

# The daemon dies. The next one has no room for a journal at first, and never any for its list.
fill "$state"
kill_daemon
(
    sleep 3
    "$QUARRY_BIN" volume show acme/a >/mnt/shown
    rm /mnt/journal/ballast
) &
# It waits until everything is attached.
start_daemon
[[ $(</mnt/shown) == *"problem"*"the journal in /mnt/journal cannot be made"* ]] || fail "nobody is told why a volume is not attached: $(</mnt/shown)"
[[ $(node a) == "$a" ]] || fail "another device"
sleep 1
works "over a kill without room"
rm "$state/ballast"
attached_now

# What libublk and udev are told.
mount -o remount,size=64k /run || mount -o remount,size=1m /run
fill /run
refused "/run/quarry/udev cannot be used"
rm /run/ballast
attached_now

kill -INT "$fio"
wait "$fio" || [[ $? == 128 ]] || fail "fio ended badly"
[[ $(grep '^3;' /mnt/fio.out | cut -d';' -f5) == 0 ]] || { cat /mnt/fio.out >&2; fail "fio saw an error or wrong data"; }
quarry volume detach acme/a
stop_daemon
say "passed"
