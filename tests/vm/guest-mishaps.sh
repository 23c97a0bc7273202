#!/usr/bin/env bash
# In the guest: what happens to a host. Its clock is set hours back and forth, the kernel kills the daemon for want of
# memory, a device's file is cut off, a second daemon is started on its cache device, and the device is moved to another host.
# usage: guest-mishaps.sh DIRECTORY
dir=$1
state=/mnt/state cache=/dev/ubda cache_size=128MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
record=/mnt/record

metric() { # NAME
    busybox wget -q -O - http://127.0.0.1:9400/metrics | awk -v m="$1{" 'index($0, m) == 1 { print $2 }'
}
works() {
    kill -0 "$writer" 2>/dev/null || fail "the writer saw an error $1"
    kill -0 "$fio" 2>/dev/null || { cat /mnt/fio.out >&2; fail "fio saw an error or wrong data $1"; }
}
refused() { # TEXT ARGUMENT...: a daemon of its own is not to start
    local text=$1
    shift
    timeout 20 "$QUARRY_BIN" serve --data-dir /mnt/other --store "file://$dir/store" --socket /run/other.sock "$@" >/mnt/said 2>&1 &&
        fail "not refused: $*"
    grep -q "$text" /mnt/said || fail "refused with: $(cat /mnt/said)"
}

start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 256MiB
quarry volume attach "$volume" --via ublk
disk=$(await_device)
mkfs.ext4 -q "$disk" || fail "mkfs.ext4"
mkdir /mnt/fs
mount "$disk" /mnt/fs || fail "mount"
quarry volume create acme/raw --size 64MiB
quarry volume attach acme/raw --via ublk
: >"$record"
write_files /mnt/fs "$record" 0 &
writer=$!
fio --name=raw --filename="$(readlink -f /dev/quarry/acme/raw)" --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k \
    --iodepth=8 --size=64m --io_size=100g --verify=crc32c --verify_backlog=256 --verify_fatal=1 --verify_state_save=0 \
    --runtime=1h --time_based --clocksource=clock_gettime --minimal --eta=never --output=/mnt/fio.out >&2 &
fio=$!

# The clock.
for hours in -5 +30 -300 +2000 -1725; do
    date --set "$hours hours" >/dev/null || fail "the clock cannot be set"
    before=$(metric quarry_volume_uploaded_bytes_total | awk '{ sum += $1 } END { print sum }')
    sleep 1.2
    works "when the clock was set $hours hours"
    timeout 30 "$QUARRY_BIN" volume sync "$volume" >/mnt/said 2>&1 || fail "sync after $hours hours: $(cat /mnt/said)"
    after=$(metric quarry_volume_uploaded_bytes_total | awk '{ sum += $1 } END { print sum }')
    ((after > before)) || fail "nothing was uploaded after $hours hours"
    for age in $(metric quarry_volume_rpo_seconds); do
        ((${age%.*} < 60)) || fail "unsent data are told to be $age s old after $hours hours"
    done
done
say "the clock was set back and forth"

# Memory.
echo 1000 >"/proc/$daemon/oom_score_adj"
mkdir /mnt/ballast
mount -t tmpfs -o size=100% tmpfs /mnt/ballast
# Until the daemon is gone; whoever else is in the way would be killed after it.
for n in $(seq 10000); do
    kill -0 "$daemon" 2>/dev/null || break
    head -c 16M /dev/zero >"/mnt/ballast/$n" 2>/dev/null || true
done
kill -0 "$daemon" 2>/dev/null && fail "memory did not end"
umount /mnt/ballast
wait "$daemon" && fail "the daemon ended well"
say "the daemon was killed for want of memory"
start_daemon
sleep 1
works "over a daemon killed for want of memory"

# A daemon that ends while it takes a device over may leave the file that libublk writes of it empty.
kill_daemon
file=/run/ublksrvd/$(printf %04d "${disk#/dev/ublkb}").json
[[ -s $file ]] || fail "there is no file $file"
: >"$file"
start_daemon
[[ $(await_device) == "$disk" ]] || fail "another device was made beside one whose file was cut off"
devices=(/sys/class/ublk-char/ublkc*)
((${#devices[@]} == 2)) || fail "there are devices beside those of the two volumes"
[[ -s $file ]] || fail "$file was not written anew"
sleep 1
works "over a device's file that was cut off"

# Another daemon on the same device, by its name and by another node: neither may touch it.
refused "the cache /dev/ubda is in use by another daemon" --cache /dev/ubda
mknod /mnt/node b $((0x$(stat -c %t /dev/ubda))) $((0x$(stat -c %T /dev/ubda)))
refused "the cache /mnt/node is in use" --cache /mnt/node
refused "the cache $disk is in use" --cache "$disk"
works "when other daemons were started on its cache"

kill -INT "$fio"
wait "$fio" || [[ $? == 128 ]] || fail "fio ended badly"
[[ $(grep '^3;' /mnt/fio.out | cut -d';' -f5) == 0 ]] || { cat /mnt/fio.out >&2; fail "fio saw an error or wrong data"; }
touch "$dir/enough"
wait "$writer" || fail "the writer saw an error"
umount /mnt/fs || fail "umount"
check_clean "$disk"
quarry volume detach acme/raw

# The host dies and its disk is put into another one, which has neither its list nor its journals: what was flushed
# comes along, unsent or not.
mount "$disk" /mnt/fs || fail "mount"
head -c 3M /dev/urandom >/mnt/fs/unsent
sync -f /mnt/fs
umount /mnt/fs || fail "umount"
kill_daemon
rm -rf "$state" /run/quarry
hostname other
state=/mnt/state-of-another start_daemon
for _ in $(seq 100); do
    [[ -e $disk ]] || break
    sleep 0.1
done
[[ ! -e $disk ]] || fail "a device that nobody wants is still there"
quarry volume attach "$volume" --via ublk
disk=$(await_device)
mount "$disk" /mnt/fs || fail "mount on another host"
check_files /mnt/fs "$record"
[[ $(stat -c %s /mnt/fs/unsent) == 3145728 ]] || fail "what was unsent is lost"
umount /mnt/fs || fail "umount"
check_clean "$disk"
quarry volume detach "$volume"
stop_daemon
say "passed"
