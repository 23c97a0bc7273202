#!/usr/bin/env bash
# In the guest: a device whose volume is encrypted in the store and whose cache is encrypted too. Its data go by copies, and
# come back after the daemon was killed; neither store nor cache device has plaintext.
# usage: guest-encrypted.sh DIRECTORY
dir=$1
state=/mnt/state cache=/mnt/cache cache_size=128MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"

node() { readlink -f /dev/quarry/acme/safe; }
mark="marked plaintext of a sector"
{ yes "$mark" || true; } | head -c 4194304 >/mnt/data
(umask 077; quarry key generate host >/mnt/keyring)
export QUARRY_CONFIG=/mnt/quarry.toml
config() { # MODE
    printf '[keys]\nkeyring = "/mnt/keyring"\n[cache]\nencrypt = true\nkey = "host"\n[ublk]\nmode = "%s"\n' "$1" >/mnt/quarry.toml
}
no_mark() { # WHEN
    sync
    if grep -q "$mark" "$cache"; then fail "$1: plaintext on the cache device"; fi
    if grep -rq "$mark" "$dir/store"; then fail "$1: plaintext in the store"; fi
}

config zero-copy
start_daemon
quarry tenant create acme
quarry volume create acme/safe --size 64MiB --compression none --key host
for mode in zero-copy plain; do
    words="user copy"
    [[ $mode == plain ]] && words=plain
    config "$mode"
    stop_daemon
    start_daemon
    quarry volume attach acme/safe --via ublk
    [[ $(quarry volume show acme/safe --output json) == *"\"$words (encrypted cache)\""* ]] || fail "$mode: not shown"
    dd if=/mnt/data of="$(node)" bs=1M oflag=direct conv=notrunc status=none || fail "$mode: write"
    # Sectors in the middle of blocks, and what is read at odd places.
    dd if=/mnt/data of="$(node)" bs=512 seek=9001 count=7 oflag=direct conv=notrunc status=none || fail "$mode: write"
    cmp -n 4194304 /mnt/data "$(node)" || fail "$mode: other data"
    no_mark "$mode, written"
    kill_daemon
    start_daemon
    cmp -n 4194304 /mnt/data "$(node)" || fail "$mode: other data after a kill"
    cmp -n 3584 /mnt/data <(dd if="$(node)" bs=512 skip=9001 count=7 iflag=direct status=none) || fail "$mode: other sectors after a kill"
    quarry volume sync acme/safe
    no_mark "$mode, sent"
    quarry volume evict acme/safe
    # From the store, and then from the cache again.
    for _ in 1 2; do
        dd if="$(node)" bs=1M count=4 iflag=direct status=none | cmp - /mnt/data || fail "$mode: other data from the store"
    done
    no_mark "$mode, fetched"
    quarry volume verify acme/safe --deep
    quarry volume detach acme/safe
done
stop_daemon
