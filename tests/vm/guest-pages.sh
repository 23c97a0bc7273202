#!/usr/bin/env bash
# In the guest: sectors that share a page of the kernel's page cache with sectors that are being written, on a cache device
# whose writes take long: who reads the one meanwhile must not make the other read as it was. With the cache on a
# block device, and in a file of an ext4.
# usage: guest-pages.sh DIRECTORY
dir=$1
cache_size=128MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
sectors=$((256 << 11))

at() { # COMMAND [FILE]
    local said=${2:-/mnt/said}
    qemu-io -f raw -c "$1" "$uri" >"$said" 2>&1 && ! grep -q "Pattern verification failed" "$said"
}

dmsetup create slow --table "0 $sectors delay /dev/ubda 0 0 /dev/ubda 0 0" || fail "dmsetup"
takes() { # MILLISECONDS
    dmsetup reload slow --table "0 $sectors delay /dev/ubda 0 0 /dev/ubda 0 $1" && dmsetup suspend --nolockfs slow &&
        dmsetup resume slow || fail "dmsetup"
}
for kind in device file; do
    takes 0
    state=/mnt/state-$kind
    if [[ $kind == device ]]; then
        cache=/dev/mapper/slow
    else
        mkfs.ext4 -q -F /dev/mapper/slow && mkdir /mnt/slow && mount /dev/mapper/slow /mnt/slow || fail "ext4"
        cache=/mnt/slow/cache
    fi
    start_daemon
    if [[ $kind == device ]]; then quarry tenant create acme; fi
    quarry volume create "acme/$kind" --size 64MiB
    uri=$(quarry volume attach "acme/$kind" --via nbd)
    [[ $uri == nbd* ]] || fail "attached as $uri"
    takes 500
    # One after the other in the segment, a sector each, far from each other in the volume.
    at "write -P 1 0 512" || fail "the first write: $(cat /mnt/said)"
    for n in 2 3 4; do
        at "write -P $n $((n << 20)) 512" /mnt/written &
        write=$!
        sleep 0.25
        kill -0 "$write" || fail "a write ended before its time"
        at "read -P 1 0 512" || fail "a read beside a write: $(cat /mnt/said)"
        wait "$write" || fail "write $n: $(cat /mnt/written)"
        at "read -P $n $((n << 20)) 512" || fail "$kind: write $n is done, and what was there before is read: $(cat /mnt/said)"
    done
    takes 0
    quarry volume detach "acme/$kind"
    stop_daemon
done
say "passed"
