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
[[ $(wc -l <"$record") -gt $(wc -l <"$dir/record.uploaded") ]] || fail "nothing was written after the sync"
say "cutting the power after $(wc -l <"$record") files"
echo 0 >"$GUEST_STATUS"
sync "$GUEST_STATUS"
busybox poweroff -n -f
