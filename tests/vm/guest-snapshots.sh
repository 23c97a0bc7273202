#!/usr/bin/env bash
# In the guest: the ublk device of a volume with ext4 on it, and beside it those of two of its snapshots and of a time, none of which
# is taken for another, neither while they are used nor when their daemon is killed and comes back.
# usage: guest-snapshots.sh DIRECTORY
dir=$1
state=/mnt/state cache=/mnt/cache cache_size=256MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
snapshots=(frozen later)

sum() { # DEVICE
    dd if="$1" bs=1M iflag=direct status=none | md5sum
}
node_of() { # NAME
    readlink -f "/dev/quarry/$1"
}
snapshot() { # NAME: of a file system that is at rest, so that it is clean
    fsfreeze -f /mnt/fs || fail "fsfreeze"
    quarry snapshot create "$volume@$1"
    fsfreeze -u /mnt/fs
}
write_some() { # FIRST
    rm -f "$dir/enough"
    write_files /mnt/fs "$record" "$1" &
    local writer=$!
    sleep 2
    touch "$dir/enough"
    wait "$writer" || fail "the writer saw an error"
}

start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 64MiB --retain 1h
quarry volume attach "$volume" --via ublk
disk=$(await_device)
mkfs.ext4 -q "$disk" || fail "mkfs.ext4"
mkdir /mnt/fs /mnt/then
mount "$disk" /mnt/fs || fail "mount"
record=/mnt/record
: >"$record"
write_some 0
snapshot frozen
cp "$record" /mnt/record-frozen
sleep 1.1
moment=$(date -u +%Y-%m-%dT%H:%M:%SZ)
write_some 1000
snapshot later
snapshots+=("$moment")

declare -A nodes sums
for name in "${snapshots[@]}"; do
    quarry volume attach "$volume@$name" --via ublk
    nodes[$name]=$(node_of "$volume@$name")
    [[ -b ${nodes[$name]} && ${nodes[$name]} != "$disk" ]] || fail "no device of its own for $name"
    [[ $(blockdev --getro "${nodes[$name]}") == 1 ]] || fail "$name takes writes"
    sums[$name]=$(sum "${nodes[$name]}")
done
[[ ${nodes[frozen]} != "${nodes[later]}" && ${sums[frozen]} != "${sums[later]}" ]] || fail "two snapshots are one"
[[ $(node_of "$volume") == "$disk" ]] || fail "the volume's link leads elsewhere"

look() { # WHEN
    [[ $(await_device) == "$disk" && $(node_of "$volume") == "$disk" ]] || fail "the volume has another device $1"
    for name in "${snapshots[@]}"; do
        [[ $(node_of "$volume@$name") == "${nodes[$name]}" ]] || fail "$name has another device $1"
        [[ $(sum "${nodes[$name]}") == "${sums[$name]}" ]] || fail "$name has changed $1"
    done
}
write_some 2000
look "while the volume is written"
for round in 1 2; do
    kill_daemon
    start_daemon
    look "after kill $round"
    write_some "${round}0000"
done

mount -o ro "${nodes[frozen]}" /mnt/then || fail "the snapshot cannot be mounted"
check_files /mnt/then /mnt/record-frozen
umount /mnt/then
quarry volume detach "$volume@frozen"
[[ ! -e ${nodes[frozen]} && ! -e /dev/quarry/$volume@frozen ]] || fail "a device that was detached is there"
[[ $(await_device) == "$disk" && $(sum "${nodes[later]}") == "${sums[later]}" ]] || fail "another went with it"
mount -o ro,noload "${nodes[$moment]}" /mnt/then || fail "what was there at $moment cannot be mounted"
check_files /mnt/then /mnt/record-frozen
umount /mnt/then
quarry volume detach "$volume@$moment"
quarry volume detach "$volume@later"
quarry snapshot delete "$volume@later"

# Gone back, the file system is that of then; a clone of it is mounted beside it.
umount /mnt/fs
quarry volume detach "$volume"
quarry volume rollback "$volume@frozen"
quarry volume clone "$volume@frozen" acme/copy
quarry volume attach "$volume" --via ublk
mount "$(await_device)" /mnt/fs || fail "mount after rollback"
check_files /mnt/fs /mnt/record-frozen
[[ ! -e /mnt/fs/f1000 ]] || fail "a younger file is there"
quarry volume attach acme/copy --via ublk
mount "$(node_of acme/copy)" /mnt/then || fail "mount of a clone"
check_files /mnt/then /mnt/record-frozen
rm -r /mnt/then/f* && sync /mnt/then
check_files /mnt/fs /mnt/record-frozen
umount /mnt/fs /mnt/then
quarry volume detach acme/copy
quarry volume detach "$volume"
quarry volume verify "$volume" --deep --snapshots
stop_daemon
