#!/usr/bin/env bash
# In the guest: a cache device that fails syncs, writes, reads, or all of it, under an ext4 and a volume without a file
# system. Flushes fail from then on, those of other volumes too, and after the device is sound again; no read is wrong;
# the operator is told. The next daemon, on the sound device, has all that was flushed; what was not is given up by the operator.
# usage: guest-bad-disk.sh DIRECTORY
dir=$1
state=/mnt/state cache=/dev/mapper/cache cache_size=128MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
sectors=$((128 << 11))
record=/mnt/record
export QUARRY_CONFIG=/mnt/quarry.toml
# What is unsent stays so until somebody asks: it is not old enough, and all that is written between two uploads is less
# than a chunk of 8 MiB. What the store has, a flush may promise whatever the cache device does.
printf '[writeback]\ndelay = "1h"\n' >"$QUARRY_CONFIG"

cache_is() { # sound|writeless|readless|gone|holed
    local table
    case $1 in
    sound) table="0 $sectors linear /dev/ubda 0" ;;
    writeless) table="0 $sectors flakey /dev/ubda 0 0 1 1 error_writes" ;;
    readless) table="0 $sectors flakey /dev/ubda 0 0 1 1 error_reads" ;;
    gone) table="0 $sectors error" ;;
    holed) table="0 $((sectors / 2)) linear /dev/ubda 0"$'\n'"$((sectors / 2)) $((sectors / 2)) error" ;;
    esac
    dmsetup reload cache <<<"$table" && dmsetup suspend --nolockfs --noflush cache && dmsetup resume cache ||
        fail "the cache cannot be $1"
    say "the cache device is $1"
}
node() { readlink -f "/dev/quarry/acme/$1"; }
writes_on() {
    rm -f "$dir/enough"
    write_files /mnt/fs "$record" "$(wc -l <"$record")" 2>/mnt/writer &
    writer=$!
}
metric() { # NAME VOLUME
    busybox wget -q -O - http://127.0.0.1:9400/metrics |
        awk -v m="$1{" -v v="volume=\"$2\"" 'index($0, m) == 1 && index($0, v) { print $2 }'
}
write_at() { # FILE MIB FLAGS
    timeout 60 dd if="$1" of="$(node raw)" bs=1M seek="$2" conv="notrunc${3:+,$3}" oflag=direct status=none 2>/mnt/said
}
read_is() { # FILE MIB
    timeout 60 dd if="$(node raw)" bs=1M skip="$2" count=1 iflag=direct status=none 2>/mnt/said | cmp -s - "$1"
}
# VOLUME has failed while DOING, a pattern, and everybody can know.
told() {
    local shown pattern="state +failed"$'\n'"problem +the cache device failed while ($2): Input/output error"
    shown=$("$QUARRY_BIN" volume show "acme/$1")
    [[ $shown =~ $pattern ]] || fail "$1 is shown as: $shown"
    [[ $(metric quarry_volume_failed "$1") == 1 ]] || fail "no metric says that $1 failed"
    grep -qE "ERROR.*the cache device failed.*volume=\"acme/$1\".*doing=\"($2)\"" "$log" || fail "the log does not say that $1 failed"
}

dmsetup create cache --table "0 $sectors linear /dev/ubda 0" || fail "dmsetup"
for name in old new newer newest; do head -c 1M /dev/urandom >"/mnt/$name"; done
start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 256MiB
quarry volume attach "$volume" --via ublk
disk=$(await_device)
quarry volume create acme/raw --size 64MiB
quarry volume attach acme/raw --via ublk
quarry volume create acme/late --size 64MiB
mkfs.ext4 -q "$disk" || fail "mkfs.ext4"
mkdir /mnt/fs
mount "$disk" /mnt/fs || fail "mount"
: >"$record"
for round in writes sync; do
    write_at /mnt/old 0 fsync || fail "a flush on a sound device"
    writes_on
    sleep 2
    if [[ $round == writes ]]; then
        # A sync or a record page that fails before a write does is the other round's.
        touch "$dir/enough"
        wait "$writer" || fail "the writer saw an error"
        sync -f /mnt/fs
    fi
    # Taken by the device and not flushed: in the second round nothing else is written to that volume.
    write_at /mnt/new 4 || fail "a write to a sound device"
    cache_is writeless
    if [[ $round == writes ]]; then
        write_at /mnt/newer 8 && fail "a write was taken by a device that takes none"
        raw_failed="writing data"
        writes_on
    else
        raw_failed="syncing[^:]*|writing a record page"
    fi
    sync "$(node raw)" && fail "a flush was acknowledged that cannot be"
    wait "$writer" && fail "the writer saw no error"
    told disk "writing data|syncing[^:]*|writing a record page"
    told raw "$raw_failed"
    read_is /mnt/old 0 || fail "what was flushed reads otherwise while the device fails"
    cache_is sound
    write_at /mnt/newer 8 fsync && fail "a flush was acknowledged after one that failed"
    if [[ $round == sync ]]; then
        # Nobody is to begin on a device that cannot tell what it has lost.
        "$QUARRY_BIN" volume attach acme/late --via ublk >/mnt/said 2>&1 && fail "attached after a sync that failed"
        grep -q "the cache device failed: Input/output error.*start the daemon anew" /mnt/said || fail "refused with: $(cat /mnt/said)"
        [[ $("$QUARRY_BIN" volume show acme/late) =~ owner ]] && fail "a volume that was not attached has an owner"
    fi
    echo 3 >/proc/sys/vm/drop_caches
    check_files /mnt/fs "$record"
    read_is /mnt/old 0 || fail "what was flushed reads otherwise"
    if [[ $round == writes ]]; then kill_daemon; else stop_daemon; fi
    start_daemon
    if [[ $round == sync ]]; then
        # The journal says what was acknowledged, and nobody what of it the device has.
        "$QUARRY_BIN" volume attach acme/raw --via ublk >/mnt/said 2>&1 && fail "what is in doubt was forgotten"
        grep -q "acknowledged and not flushed when the cache device of this host failed a sync.*--discard-lost" /mnt/said ||
            fail "refused with: $(cat /mnt/said)"
        [[ $("$QUARRY_BIN" volume show acme/raw) == *"failed a sync"* ]] || fail "a volume in doubt is shown as $("$QUARRY_BIN" volume show acme/raw)"
        for name in raw disk; do
            [[ $("$QUARRY_BIN" volume show "acme/$name") == *"failed a sync"* ]] || continue
            say "$name is in doubt"
            quarry volume attach "acme/$name" --via ublk --discard-lost
        done
    fi
    umount /mnt/fs || fail "umount"
    mount "$(await_device)" /mnt/fs || fail "mount after $round"
    check_files /mnt/fs "$record"
    read_is /mnt/old 0 || fail "what was flushed is lost after $round"
    umount /mnt/fs || fail "umount"
    check_clean "$(await_device)"
    [[ $(metric quarry_volume_failed disk) == 0 ]] || fail "the next daemon says that it fails, too"
    mount "$(await_device)" /mnt/fs || fail "mount"
done

# Reads fail: what the store has comes from there, what only the cache has is an error, and nothing is wrong. The volume
# goes on, and is well again with its device.
write_at /mnt/new 4 fsync || fail "write"
quarry volume sync acme/raw
write_at /mnt/newer 8 fsync || fail "write"
cache_is readless
for round in 1 2; do
    read_is /mnt/new 4 || fail "what the store has cannot be read"
    read_is /mnt/newer 8 && fail "read from a device that cannot be read"
    grep -q "Input/output error" /mnt/said || fail "wrong data, or another error than EIO: $(cat /mnt/said)"
done
[[ $("$QUARRY_BIN" volume show acme/raw) =~ problem\ +unsent\ data\ cannot\ be\ read ]] || fail "nobody is told that unsent data cannot be read"
[[ $(metric quarry_volume_failed raw) == 1 ]] || fail "no metric says so"
write_at /mnt/newest 12 fsync || fail "a write, which needs no read"
timeout 60 "$QUARRY_BIN" volume sync acme/raw >/mnt/synced 2>&1 &
sync=$!
sleep 1
kill -0 "$sync" || fail "unsent data that cannot be read were sent: $(cat /mnt/synced)"
cache_is sound
wait "$sync" || fail "sync: $(cat /mnt/synced)"
read_is /mnt/newer 8 && read_is /mnt/newest 12 || fail "other data"
[[ $(metric quarry_volume_failed raw) == 0 ]] || fail "the problem is told when it is over: $("$QUARRY_BIN" volume show acme/raw)"

# All fails, as of a disk that was pulled out.
write_at /mnt/newer 16 fsync || fail "write"
cache_is gone
read_is /mnt/newest 12 || fail "what the store has cannot be read"
read_is /mnt/newer 16 && fail "read from a device that is gone"
write_at /mnt/new 20 && fail "a write was taken by a device that is gone"
quarry status --output json
kill_daemon
for how in gone holed; do
    cache_is "$how"
    timeout 20 "$QUARRY_BIN" serve --data-dir "$state" --store "file://$dir/store" --cache "$cache" --socket /run/other.sock >/mnt/said 2>&1 &&
        fail "a daemon serves with a cache device that is $how"
    grep -qE "cannot read the cache /dev/mapper/cache|the cache /dev/mapper/cache cannot be read" /mnt/said &&
        grep -q "Input/output error" /mnt/said || fail "said: $(cat /mnt/said)"
done
cache_is sound
start_daemon
await_device
for file in old:0 new:4 newer:8 newest:12 newer:16; do
    read_is "/mnt/${file%:*}" "${file#*:}" || fail "$file is lost or wrong"
done
umount /mnt/fs || fail "umount"
check_clean "$(await_device)"
mount -o ro "$(await_device)" /mnt/fs || fail "mount"
check_files /mnt/fs "$record"
umount /mnt/fs
say "passed"
