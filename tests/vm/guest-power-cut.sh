#!/usr/bin/env bash
# In the guest: one life of a host. The cache is the disk /dev/ubda, which outlives the guest.
# usage: guest-power-cut.sh DIRECTORY first|again|elsewhere SECONDS
#   first      make the volume and its file system, write, and cut the power after SECONDS
#   again      with the cache kept: check everything that was synced, write on, and cut the power
#   elsewhere  with cache and state lost: check that the store holds a clean file system with everything that was
#              there at the last `quarry volume sync`
dir=$1 life=$2 seconds=$3
state=$dir/state cache=/dev/ubda cache_size=256MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
record=$dir/record

# After the reboot somebody else's device has the number that ours had, and its users must not notice us.
if [[ $life == again ]]; then
    ours=$QUARRY_SOCKET
    export QUARRY_SOCKET=/run/other.sock
    state=/mnt/other-state cache=/mnt/other-cache cache_size=64MiB listen=127.0.0.1:9401 start_daemon
    "$QUARRY_BIN" tenant create other >/dev/null 2>&1 || true
    quarry volume create "other/life$$-$RANDOM" --size 32MiB >/mnt/other
    quarry volume attach "$(cut -d: -f1 /mnt/other)" --via ublk
    [[ -b /dev/ublkb0 ]] || fail "the other device has not the number 0"
    head -c 1M /dev/urandom >/mnt/other-data
    dd if=/mnt/other-data of=/dev/ublkb0 bs=1M oflag=direct status=none
    export QUARRY_SOCKET=$ours
fi

start_daemon
mkdir /mnt/fs
case $life in
first)
    quarry tenant create acme
    quarry volume create "$volume" --size 1GiB
    quarry volume attach "$volume" --via ublk
    disk=$(await_device)
    mkfs.ext4 -q "$disk" || fail "mkfs.ext4"
    : >"$record"
    ;;
again)
    disk=$(await_device)
    [[ $disk != /dev/ublkb0 ]] || fail "the volume was given somebody else's device"
    ;;
elsewhere)
    quarry volume attach "$volume" --via ublk --force
    disk=$(await_device)
    ;;
esac
mount "$disk" /mnt/fs || fail "mount"

if [[ $life == elsewhere ]]; then
    check_files /mnt/fs "$dir/record.uploaded"
    umount /mnt/fs || fail "umount"
    check_clean "$disk"
    quarry volume detach "$volume"
    say "passed"
    exit 0
fi

check_files /mnt/fs "$record"
if [[ $life == again ]]; then
    umount /mnt/fs || fail "umount"
    check_clean "$disk"
    mount "$disk" /mnt/fs || fail "mount"
fi
write_files /mnt/fs "$record" "$(wc -l <"$record")" &
sleep "$seconds"
cp "$record" "$dir/record.before"
quarry volume sync "$volume"
mv "$dir/record.before" "$dir/record.uploaded"
sync "$dir/record.uploaded" "$dir"
sleep "$seconds"
[[ $life == first ]] || cmp -n 1048576 /mnt/other-data /dev/ublkb0 || fail "somebody else's device was touched"
[[ $(wc -l <"$record") -gt $(wc -l <"$dir/record.uploaded") ]] || fail "nothing was written after the sync"
say "cutting the power after $(wc -l <"$record") files"
echo 0 >"$GUEST_STATUS"
sync "$GUEST_STATUS"
busybox poweroff -n -f
