#!/usr/bin/env bash
# In the guest: an image imported, exported from its block device while it is one, and not imported into that.
# usage: guest-images.sh DIRECTORY
dir=$1
state=/mnt/state cache=/mnt/cache cache_size=256MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
export XDG_STATE_HOME=/mnt

start_daemon
quarry tenant create acme
truncate -s 64M /mnt/image
dd if=/dev/urandom of=/mnt/image bs=1M count=9 seek=30 conv=notrunc status=none
quarry volume import /mnt/image "$volume" >&2
quarry volume attach "$volume" --via ublk
disk=$(await_device)
cmp "$disk" /mnt/image || fail "the device is not what was imported"
"$QUARRY_BIN" volume import /mnt/image "$volume" --overwrite 2>/mnt/refused && fail "imported into a device in use"
grep -q "attached as /dev/ublkb.* may be in use; detach it first" /mnt/refused || fail "refused with: $(cat /mnt/refused)"
dd if=/dev/urandom of="$disk" bs=1M count=3 oflag=direct conv=notrunc status=none || fail "write"
quarry volume export "$volume" /mnt/back >&2
cmp "$disk" /mnt/back || fail "the image is not what the device has"
(($(stat -c %b /mnt/back) < 2 * 1024 * 20)) || fail "the image is not sparse"
"$QUARRY_BIN" volume export "$volume" - 2>/mnt/told | cmp - /mnt/back || fail "standard output has something else"
grep -q "attached for writing" /mnt/told || fail "nothing was said of its users: $(cat /mnt/told)"
[[ $(quarry volume show "$volume" --output json) == *'"state": "attached"'* ]] || fail "it is attached no more"
quarry volume detach "$volume"
stop_daemon
say "passed"
