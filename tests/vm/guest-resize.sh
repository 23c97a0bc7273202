#!/usr/bin/env bash
# In the guest: ublk devices that grow in use, one with ext4 on it, one read and written by fio. Their daemon is killed
# afterwards, and between the growth of the volume and that of its device.
# usage: guest-resize.sh DIRECTORY
dir=$1
state=/mnt/state cache=/mnt/cache cache_size=256MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
raw=acme/raw
mib=$((1 << 20))

# The kernel's own word, which does not wait for a daemon.
mib_of() { # DEVICE
    echo $(($(cat "/sys/block/$(basename "$1")/size") * 512 / mib))
}
resize() { # VOLUME MIB
    local said
    said=$(quarry volume resize "$1" "$2MiB")
    [[ $said == "$1: it has $2MiB" ]] || fail "resize said: $said"
}
fio_new_area() { # MODE
    fio --name=new --filename="$node" --ioengine=libaio --direct=1 --rw="$1" --bsrange=4k-64k --iodepth=16 \
        --offset=16m --size=48m --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randrepeat=1 --minimal --eta=never \
        --output=/mnt/fio.out || { cat /mnt/fio.out >&2; fail "fio $1 in the new area"; }
}

start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 64MiB
quarry volume attach "$volume" --via ublk
disk=$(await_device)
mkfs.ext4 -q "$disk" || fail "mkfs.ext4"
mkdir /mnt/fs
mount "$disk" /mnt/fs || fail "mount"
record=/mnt/record
: >"$record"
write_files /mnt/fs "$record" 0 &
writer=$!
writes_on() {
    kill -0 "$writer" 2>/dev/null || fail "the writer saw an error $1"
}

# ext4 grows online.
sleep 1
resize "$volume" 256
[[ $(blockdev --getsize64 "$disk") == $((256 * mib)) ]] || fail "the device does not show its new size at once"
shown=$(quarry volume show "$volume" --output json)
[[ $(grep -oE "\"size_bytes\": ?$((256 * mib))" <<<"$shown" | wc -l) == 2 ]] || fail "$shown"
writes_on "while the volume grew"
resize2fs "$disk" >&2 || fail "resize2fs"
(($(df --output=size -m /mnt/fs | tail -n 1) > 200)) || fail "the file system has not grown"
sleep 1
writes_on "after the file system grew"
kill_daemon
start_daemon
[[ $(await_device) == "$disk" ]] || fail "the device has another name"
[[ $(mib_of "$disk") == 256 ]] || fail "a device that was taken over has another size"
writes_on "over a kill"
"$QUARRY_BIN" volume resize "$volume" 128MiB 2>/mnt/refused && fail "a volume was made smaller"
grep -q "256MiB and cannot shrink to 128MiB" /mnt/refused || fail "shrinking is refused with: $(cat /mnt/refused)"
touch "$dir/enough"
wait "$writer" || fail "the writer saw an error"
check_files /mnt/fs "$record"

# Without a file system: what is new is zeroes, then what was written, over a kill as well.
quarry volume create "$raw" --size 16MiB --sector-size 4096
quarry volume attach "$raw" --via ublk
node=$(readlink -f "/dev/quarry/$raw")
dd if=/dev/urandom of=/mnt/old bs=1M count=16 status=none
dd if=/mnt/old of="$node" bs=1M oflag=direct conv=notrunc status=none || fail "write"
resize "$raw" 64
[[ $(blockdev --getsize64 "$node") == $((64 * mib)) ]] || fail "wrong size"
cmp -n $((48 * mib)) -i $((16 * mib)):0 "$node" /dev/zero || fail "what is new is not zeroes"
fio_new_area randwrite &
fio=$!
sleep 0.3
resize "$raw" 80
wait "$fio" || fail "fio while the device grew"
kill_daemon
start_daemon
[[ $(mib_of "$node") == 80 ]] || fail "a device that was taken over has another size"
fio_new_area read
cmp -n $((16 * mib)) /mnt/old "$node" || fail "what was there before is not any more"

# A daemon dies when its volume has grown and its device has not. Made by one that finds no ublk, and so does not serve
# the volume that is its own.
kill_daemon
mv /dev/ublk-control /dev/ublk-control.away
start_daemon
resize "$raw" 96
[[ $(mib_of "$node") == 80 ]] || fail "a device without a daemon has grown"
kill_daemon
mv /dev/ublk-control.away /dev/ublk-control
start_daemon
[[ $(readlink -f "/dev/quarry/$raw") == "$node" ]] || fail "the smaller device was not taken over"
[[ $(blockdev --getsize64 "$node") == $((96 * mib)) ]] || fail "the smaller device was not grown"
cmp -n $((16 * mib)) /mnt/old "$node" || fail "the smaller device has lost its data"
fio_new_area read
cmp -n $((32 * mib)) -i $((64 * mib)):0 "$node" /dev/zero || fail "what is new is not zeroes"
dd if=/mnt/old of="$node" bs=1M seek=80 oflag=direct conv=notrunc status=none || fail "write at the new end"
cmp -n $((16 * mib)) -i 0:$((80 * mib)) /mnt/old "$node" || fail "the new end reads otherwise"

# Detached and attached elsewhere: everything is in the store.
check_files /mnt/fs "$record"
umount /mnt/fs || fail "umount"
quarry volume detach "$volume"
quarry volume detach "$raw"
stop_daemon
rm -rf "$state" "$cache"
start_daemon
quarry volume attach "$volume" --via ublk
disk=$(await_device)
[[ $(mib_of "$disk") == 256 ]] || fail "attached anew with another size"
check_clean "$disk"
mount -o ro "$disk" /mnt/fs || fail "mount after all"
check_files /mnt/fs "$record"
umount /mnt/fs
quarry volume attach "$raw" --via ublk
node=$(readlink -f "/dev/quarry/$raw")
[[ $(mib_of "$node") == 96 ]] || fail "attached anew with another size"
fio_new_area read
cmp -n $((16 * mib)) -i 0:$((80 * mib)) /mnt/old "$node" || fail "the new end is not in the store"
quarry volume detach "$volume"
quarry volume detach "$raw"
stop_daemon
say "passed"
