#!/bin/bash
# The ublk front end against a real kernel: as root, under a kernel with ublk (User Mode Linux will do).
# usage: ublk_smoke.sh PATH_OF_THE_EXAMPLE_BINARY
# Needs fio, mkfs.ext4, blkdiscard. Works in /mnt. Prints "ok NAME" for each check; the first failure ends it.
set -euo pipefail
smoke=$1
dir=$(mktemp -d /mnt/smoke.XXXXXX)
mib=256
pid=
trap 'status=$?; [ $status = 0 ] || { echo "FAILED (status $status)"; tail -n 20 "$dir"/err; }; [ -z "$pid" ] || kill -9 $pid 2>/dev/null' EXIT

start() { # options: starts the daemon, sets pid, dev and mode
    : >"$dir/out"
    "$smoke" "$dir/file" $mib "$@" >"$dir/out" 2>>"$dir/err" &
    pid=$!
    for _ in $(seq 600); do
        grep -q ^ready "$dir/out" && break
        kill -0 $pid 2>/dev/null || { echo "the daemon ended: $*"; exit 1; }
        sleep 0.05
    done
    read -r _ dev link mode <"$dir/out"
    [ "$(readlink -f "$link")" = "$dev" ]
}
finish() { # removes the device: nothing may be left
    kill -TERM $pid
    wait $pid
    pid=
    [ ! -e "$dev" ] && [ ! -e "$link" ] && [ -z "$(ls /run/ublksrvd)" ] && [ -z "$(ls /sys/class/ublk-char)" ]
}
ok() { echo "ok $*"; }
fio_() { fio --name=t --filename="$dev" --ioengine=libaio --direct=1 --size=128m --minimal --eta=never --verify_state_save=0 --output=/dev/null "$@"; }

round() { # NAME SECTOR_SIZE OPTIONS...: all that needs no crash
    local name=$1 sector=$2
    shift 2
    rm -f "$dir/file"
    start "$sector" "$@"
    ok "$name: started, mode '$mode'"
    dd if=/dev/urandom of="$dir/random" bs=1M count=32 status=none
    dd if="$dir/random" of="$dev" bs=1M oflag=direct status=none
    dd if="$dev" bs=64k count=512 iflag=direct status=none | cmp - "$dir/random"
    cmp -n $((32 << 20)) "$dir/file" "$dir/random"
    ok "$name: large writes are read back, and are in the file"
    fio_ --rw=randwrite --bsrange="$sector"-256k --iodepth=64 --io_size=64m \
        --fsync=32 --verify=crc32c --verify_fatal=1 --do_verify=1
    ok "$name: fio random writes of mixed sizes verify"
    fio_ --rw=randrw --bs=4k --iodepth=128 --io_size=32m --verify=crc32c --verify_fatal=1 --sync=dsync
    ok "$name: fio synchronous writes at depth 128 verify"
    special=$((mib - 2))
    dd if="$dev" bs=1M skip=$special count=1 iflag=direct status=none | cmp -n $((1 << 20)) - /dev/zero
    dd if="$dev" bs=1M skip=$((special + 1)) count=1 iflag=direct status=none >"$dir/pattern"
    seq -f '%015.0f' 0 16 1048575 | cmp - "$dir/pattern"
    dd if="$dev" bs=96k skip=$((special * 1024 / 96)) iflag=direct status=none | tail -c $((1 << 20)) | cmp - "$dir/pattern"
    ok "$name: zero fill and copied data, alone and in one request with others"
    if dd if="$dir/random" of="$dev" bs=4k seek=$((special * 256)) count=1 oflag=direct status=none 2>/dev/null; then exit 1; fi
    ok "$name: a write that the volume refuses is an error"
    blkdiscard -o 4M -l 8M "$dev"
    dd if="$dev" bs=1M skip=4 count=8 iflag=direct status=none | cmp -n $((8 << 20)) - /dev/zero
    blkdiscard -z -o 16M -l 64M "$dev"
    dd if="$dev" bs=1M skip=16 count=64 iflag=direct status=none | cmp -n $((64 << 20)) - /dev/zero
    ok "$name: discarded and zeroed runs read as zeroes"
    mkfs.ext4 -q -F -b 4096 "$dev" $(((mib - 2) * 256))
    mkdir -p "$dir/mnt"
    mount "$dev" "$dir/mnt"
    cp "$dir/random" "$dir/mnt/a"
    tar -C /usr/share -cf "$dir/mnt/tar" common-licenses
    if kill -TERM $pid && wait $pid; then exit 1; fi
    ok "$name: a mounted device is not removed"
    start "$sector" recover "$@"
    cmp "$dir/mnt/a" "$dir/random"
    fstrim "$dir/mnt"
    umount "$dir/mnt"
    fsck.ext4 -fn "$dev" >/dev/null 2>&1
    mount "$dev" "$dir/mnt"
    cmp "$dir/mnt/a" "$dir/random"
    umount "$dir/mnt"
    ok "$name: ext4 made, mounted, trimmed, checked, over a daemon that went and came"
    finish
    ok "$name: removed, nothing left behind"
}

crash() { # NAME OPTIONS...: kill -9 with requests under way, and recovery
    local name=$1
    shift
    rm -f "$dir/file"
    start 512 "$@"
    mkfs.ext4 -q -F -b 4096 "$dev" $(((mib - 2) * 256))
    mount "$dev" "$dir/mnt"
    fio --name=t --directory="$dir/mnt" --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=32 --size=64m \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --minimal --eta=never --verify_state_save=0 --output=/dev/null &
    local fio=$!
    for n in 1 2 3 4 5; do
        sleep 0.3
        # The next one looks for the device while the kernel still clears up.
        kill -9 $pid
        disown $pid
        start 512 recover "$@"
    done
    ok "$name: killed and recovered 5 times under load, mode '$mode'"
    wait $fio
    ok "$name: what was written over the crashes verifies"
    kill -INT $pid
    wait $pid
    start 512 recover "$@"
    ok "$name: a daemon that ended and left its device is followed by another"
    umount "$dir/mnt"
    fsck.ext4 -fn "$dev" >/dev/null 2>&1
    finish
    ok "$name: the file system is whole"
}

round 'zero copy, 512' 512
round 'zero copy, 4096' 4096
if grep -q 'data are copied' "$dir/err"; then exit 1; fi
ok 'no request of a zero-copy device was copied'
round 'failed registration' 512 no-table
round 'user copy' 512 user-copy
crash 'crash, zero copy'
crash 'crash, user copy' user-copy
for n in $(seq 20); do
    start 512
    finish
done
ok '20 devices made and removed one after another'
