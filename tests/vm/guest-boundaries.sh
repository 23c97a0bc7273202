#!/usr/bin/env bash
# In the guest: what a power cut at a flush leaves. A host whose one disk holds the cache and, on an ext4, the store and
# the daemon's state. dm-log-writes notes in which order the disk's flushes made which writes durable, while a file
# system on a volume is used and the daemon is killed once. Afterwards the disk is made as it was at each flush (or at
# COUNT of them, evenly chosen), every second time with some of what was written next, and used: each file that had
# been synced by then is there, and both file systems are clean.
# usage: guest-boundaries.sh DIRECTORY LOG-WRITES ext4|xfs COUNT SECONDS
dir=$1 log_writes=$2 fs=$3 count=$4 seconds=$5
state=/mnt/host/state cache=/dev/mapper/cache cache_size=64MiB store=file:///mnt/host/store
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
disk=/dev/ubda disk_log=/dev/ubdb
cache_bytes=$((64 << 20)) disk_bytes=$(blockdev --getsize64 /dev/ubda)
cache_sectors=$((cache_bytes / 512)) disk_sectors=$((disk_bytes / 512))
record=/mnt/record
# Much is to happen in a short time: uploads, checkpoints, segments that are used again.
export QUARRY_CONFIG=/mnt/quarry.toml
printf '[writeback]\ndelay = "500ms"\nchunk_size = "1MiB"\n' >"$QUARRY_CONFIG"

mark() { dmsetup message disk 0 mark "$1" || fail "mark $1"; }
promised() { mark "$1"; }
fs_check() {
    case $fs in
    ext4) check_clean "$1" ;;
    xfs) xfs_repair -n "$1" >"$dir/xfs_repair.log" 2>&1 || { cat "$dir/xfs_repair.log" >&2; fail "the XFS is not clean"; } ;;
    esac
}

# The disk as it is before the log begins.
mkfs.ext4 -q -E "offset=$cache_bytes" "$disk" "$(((disk_bytes - cache_bytes) >> 10))k" || fail "mkfs.ext4 for the host"
dd if="$disk" of=/mnt/base bs=1M conv=sparse status=none
truncate -s "$disk_bytes" /mnt/base

dmsetup create disk --table "0 $disk_sectors log-writes $disk $disk_log" || fail "dm-log-writes"
dmsetup create cache --table "0 $cache_sectors linear /dev/mapper/disk 0"
dmsetup create host --table "0 $((disk_sectors - cache_sectors)) linear /dev/mapper/disk $cache_sectors"
mkdir /mnt/host /mnt/fs
mount /dev/mapper/host /mnt/host || fail "mount the host's"
start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 512MiB
mark volume
quarry volume attach "$volume" --via ublk
device=$(await_device)
"mkfs.$fs" -q "$device" || fail "mkfs.$fs"
mount "$device" /mnt/fs || fail "mount"
sync -f /mnt/fs
mark 0
: >"$record"
write_files /mnt/fs "$record" 0 &
writer=$!
sleep "$seconds"
kill_daemon
start_daemon
sleep "$seconds"
touch "$dir/enough"
wait "$writer" || fail "the writer saw an error"
umount /mnt/fs || fail "umount"
# The last flushes are those of a volume that is detached.
quarry volume detach "$volume"
stop_daemon
umount /mnt/host || fail "umount the host's"
for name in host cache disk; do dmsetup remove "$name" || fail "dmsetup remove"; done

"$log_writes" "$disk_log" boundaries >/mnt/boundaries || fail "the log cannot be read"
all=$(wc -l </mnt/boundaries)
((count < all)) || count=$all
say "$all flushes with $(wc -l <"$record") files; looking at $count after $SECONDS s"
((all > 100)) || fail "too few to be true"

# As it was when ENTRIES of the log were replayed and MARK was the newest; NEXT ends what may have been written.
at_boundary() { # ENTRIES MARK NEXT SEED
    local entries=$1 mark=$2 next=$3 seed=$4 loops=() device=
    cp --sparse=auto /mnt/base /mnt/work
    if ((seed % 2)); then
        "$log_writes" "$disk_log" replay "$entries" "$next" /mnt/work "$seed" || fail "replay a cut"
    fi
    loops+=("$(losetup --find --show --sizelimit "$cache_bytes" /mnt/work)")
    loops+=("$(losetup --find --show --offset "$cache_bytes" /mnt/work)")
    # The power was cut: the journals are gone.
    rm -rf /run/quarry
    mount "${loops[1]}" /mnt/host || fail "mount the host's"
    cache=${loops[0]} start_daemon
    if [[ $("$QUARRY_BIN" volume show "$volume" --output json 2>/mnt/said) =~ (/dev/ublkb[0-9]+) ]]; then
        device=$(await_device)
    elif "$QUARRY_BIN" volume attach "$volume" --via ublk >/mnt/said 2>&1; then
        device=$(await_device)
    elif [[ $mark != - ]]; then
        fail "the volume cannot be attached: $(cat /mnt/said)"
    fi
    if [[ $mark =~ ^[0-9]+$ ]]; then
        mount "$device" /mnt/fs || fail "mount"
        head -n "$mark" "$record" >/mnt/record.promised
        check_files /mnt/fs /mnt/record.promised
        umount /mnt/fs || fail "umount"
        fs_check "$device"
    fi
    if [[ -n $device ]]; then quarry volume detach "$volume" --output json; fi
    kill_daemon
    umount /mnt/host || fail "umount the host's"
    losetup --detach "${loops[@]}"
}

mapfile -t boundaries </mnt/boundaries
done=0
for n in $(seq "$count"); do
    # The last one too.
    at=$((n * all / count - 1))
    read -r entries mark <<<"${boundaries[at]}"
    read -r next _ <<<"${boundaries[at + 1]:-$entries}"
    "$log_writes" "$disk_log" replay "$done" "$entries" /mnt/base || fail "replay"
    done=$entries
    say "flush $((at + 1)) of $all, $mark"
    at_boundary "$entries" "$mark" "$next" "$n"
done
say "passed: $count of $all flushes, $((count / 2)) of them with some of what came next, in $SECONDS s"
