#!/usr/bin/env bash
# In the guest: ext4 on a ublk device, and fio on another without any file system, whose daemon is killed again and
# again under load, and comes back, and then is replaced in good order: by one that takes over, by one started after it ended. fio reads back what was acknowledged and never
# flushed.
# usage: guest-daemon-killed.sh DIRECTORY KILLS REPLACEMENTS
dir=$1 kills=$2 replacements=$3
state=/mnt/state cache=/mnt/cache cache_size=256MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"

start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 1GiB
attached=$(quarry volume attach "$volume" --via ublk --output json)
say "attached: $attached"
disk=$(await_device)
[[ -L /dev/quarry/$volume ]] || fail "no link /dev/quarry/$volume"
[[ $(readlink -f "/dev/quarry/$volume") == "$disk" ]] || fail "the link leads elsewhere"
[[ $(blockdev --getsize64 "$disk") == 1073741824 ]] || fail "wrong size"

quarry volume create acme/raw --size 256MiB --sector-size 4096
quarry volume attach acme/raw --via ublk
raw=$(readlink -f /dev/quarry/acme/raw)
fio --name=raw --filename="$raw" --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=16 --size=256m \
    --io_size=100g --verify=crc32c --verify_backlog=512 --verify_fatal=1 --verify_state_save=0 --runtime=1h --time_based \
    --minimal --eta=never --output=/mnt/fio.out >&2 &
fio=$!

mkfs.ext4 -q "$disk" || fail "mkfs.ext4"
mkdir /mnt/fs
mount "$disk" /mnt/fs || fail "mount"
record=/mnt/record
: >"$record"
write_files /mnt/fs "$record" 0 &
writer=$!
look() { # ROUND: nobody has noticed anything
    kill -0 "$writer" 2>/dev/null || fail "the writer saw an error $1"
    [[ $(await_device) == "$disk" ]] || fail "the device has another name $1"
    kill -0 "$fio" 2>/dev/null || { cat /mnt/fio.out >&2; fail "fio saw an error or wrong data $1"; }
}
for round in $(seq "$kills"); do
    sleep "1.$((RANDOM % 10))"
    kill_daemon
    sleep 0.3
    start_daemon
    look "after kill $round"
done
for round in $(seq "$replacements"); do
    sleep "1.$((RANDOM % 10))"
    if ((round % 2)); then
        replace_daemon
    else
        stop_daemon
        start_daemon
    fi
    look "after replacement $round"
done
pauses=$(sed -n 's/.*pause_ms=\([0-9]*\).*/\1/p' "$log" | sort -n)
say "the devices' users waited (ms):" $pauses
[[ $(wc -w <<<"$pauses") == $((2 * replacements)) ]] || fail "not every pause is told"
longest=$(tail -n 1 <<<"$pauses")
((longest < 5000)) || fail "a device's users waited $longest ms"

sleep 1
kill -INT "$fio"
# An fio that was interrupted ends with 128; its own count of errors is the fifth field.
wait "$fio" || [[ $? == 128 ]] || fail "fio ended badly"
result=$(grep '^3;' /mnt/fio.out)
[[ $(cut -d';' -f5 <<<"$result") == 0 ]] || { cat /mnt/fio.out >&2; fail "fio saw an error or wrong data"; }
say "fio wrote $(cut -d';' -f47 <<<"$result") KiB and read $(cut -d';' -f6 <<<"$result") KiB back, none of it wrong"
quarry volume detach acme/raw
touch "$dir/enough"
wait "$writer" || fail "the writer saw an error"
check_files /mnt/fs "$record"
fstrim -v /mnt/fs || fail "fstrim"
check_files /mnt/fs "$record"
umount /mnt/fs || fail "umount"
check_clean "$disk"

# Detached and attached elsewhere: everything is in the store.
quarry volume detach "$volume"
[[ ! -e $disk ]] || fail "the device is still there after detach"
[[ ! -e /dev/quarry/$volume ]] || fail "the link is still there after detach"
stop_daemon
rm -rf "$state" "$cache"
start_daemon
quarry volume attach "$volume" --via ublk
disk=$(await_device)
check_clean "$disk"
mount -o ro "$disk" /mnt/fs || fail "mount after all"
check_files /mnt/fs "$record"
umount /mnt/fs
quarry volume detach "$volume"
stop_daemon
say "passed"
