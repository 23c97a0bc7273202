#!/usr/bin/env bash
# In the guest: direct reads. What the cache lacks is received from a real S3 server straight into the readers' pages,
# by the counters without a byte of it in the daemon's memory; a server that is slow, breaks off or stalls in the middle
# of a body, and a daemon that dies there, cost time and nothing else.
# usage: guest-direct.sh DIRECTORY WEED PROXY
dir=$1 weed=$2 proxy=$3
state=/mnt/state cache=/mnt/cache cache_size=128MiB store=s3://quarry/direct
export AWS_ENDPOINT_URL=http://127.0.0.1:8334 AWS_ACCESS_KEY_ID=quarry-tests AWS_SECRET_ACCESS_KEY=not-a-secret
export AWS_REGION=us-east-1
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"

# What was hot would be fetched at once, and nothing be left to miss.
printf '[cache]\nhot_set = false\n' >/mnt/quarry.toml
export QUARRY_CONFIG=/mnt/quarry.toml

counter() { # METRIC
    busybox wget -q -O - http://127.0.0.1:9400/metrics | awk -v m="quarry_volume_$1_total{" 'index($0, m) == 1 { print $2 }'
}
mood() { echo "$1" >/mnt/mood.new && mv /mnt/mood.new /mnt/mood; }

# Its working directory and home, so that no settings of the machine apply.
mkdir /mnt/weed
cat >/mnt/weed.json <<JSON
{"identities": [{"name": "tests", "credentials": [{"accessKey": "$AWS_ACCESS_KEY_ID", "secretKey": "$AWS_SECRET_ACCESS_KEY"}],
 "actions": ["Admin", "Read", "List", "Tagging", "Write"]}]}
JSON
(cd /mnt && HOME=/mnt exec "$weed" -logtostderr server -s3 -filer -ip=127.0.0.1 -ip.bind=127.0.0.1 \
    -master.telemetry=false -master.volumePreallocate=false -master.volumeSizeLimitMB=64 -volume.max=20 \
    -volume.preStopSeconds=0 -s3.iam=false -s3.port.iceberg=0 -s3.port.lance=0 -s3.port=8333 \
    -dir=/mnt/weed -s3.config=/mnt/weed.json) >"$dir/weed.log" 2>&1 &
server=$!
for _ in $(seq 600); do
    busybox wget -q -O - http://127.0.0.1:8333/readyz >/dev/null 2>&1 && break
    kill -0 "$server" 2>/dev/null || { tail -n 30 "$dir/weed.log" >&2; fail "the S3 server ended"; }
    sleep 0.1
done
mood calm
"$proxy" 127.0.0.1:8334 127.0.0.1:8333 /mnt/mood &

# 16 MiB whose every block knows where it belongs, and a copy of them.
start_daemon
quarry tenant create acme
quarry volume create "$volume" --size 16MiB --compression none
quarry volume attach "$volume" --via ublk
disk=$(await_device)
blocks() { # MODE...: blocks of 64 KiB
    fio --name=blocks --filename="$disk" --ioengine=libaio --direct=1 --bs=64k --iodepth=16 \
        --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal --eta=never --output=/mnt/fio.out "$@"
}
blocks --rw=write --do_verify=0 || { cat /mnt/fio.out >&2; fail "write"; }
dd if="$disk" of=/mnt/data bs=1M iflag=direct status=none
quarry volume detach "$volume" --output json

# Another daemon, whose cache has none of it.
stop_daemon
rm -rf "$state" "$cache"
start_daemon
quarry volume attach "$volume" --via ublk --direct-reads
disk=$(await_device)
[[ $(quarry volume show "$volume") == *"direct reads    yes ("* ]] || fail "direct reads are not shown"
wanted=$(counter read_bytes)
check() { # BLOCK SIZE: of the device, and of the copy
    dd if="$disk" bs="$2" skip="$1" count=1 iflag=direct status=none | cmp - <(dd if=/mnt/data bs="$2" skip="$1" count=1 status=none) ||
        fail "block $1 of $2 bytes is wrong"
    wanted=$((wanted + $2))
}
# In no equal steps, or there would be readahead.
for n in $(seq 40); do
    check $((n * n * 37 % 256)) 65536
    check $((n * n * 1237 % 4096)) 4096
    # A part of it in one frame, the rest in the next.
    check $((n * n * 37 % 85 * 16 + 5)) 12288
done
say "$wanted bytes read: $(counter direct_bytes) directly in $(counter direct_reads) reads, $(counter copied_bytes) copied"
[[ $(counter read_bytes) == "$wanted" ]] || fail "other reads than these were made"
[[ $(counter direct_bytes) == "$wanted" ]] || fail "not all was read directly"
[[ $(counter copied_bytes) == 0 ]] || fail "something was copied"
[[ $(counter direct_fallbacks) == 0 ]] || fail "something fell back"
[[ $(counter errors) == 0 ]] || fail "errors"

read_blocks() { # SEED: 64 of them, in an order in which little is read ahead, in the background
    blocks --rw=randread --io_size=4m --randseed="$1" &
    reader=$!
}
all_read() {
    wait "$reader" || { cat /mnt/fio.out >&2; fail "$1: wrong data or an error"; }
    [[ $(counter errors) == 0 ]] || fail "$1: errors"
    say "$1: $(counter direct_reads) direct reads, $(counter direct_fallbacks) fell back"
}
mood slow
before=$(counter direct_reads)
read_blocks 10
all_read "a slow server"
(($(counter direct_reads) >= before + 48)) || fail "few reads were direct"
[[ $(counter direct_fallbacks) == 0 ]] || fail "bodies that come in pieces fell back"

mood cut
read_blocks 11
sleep 2
mood calm
all_read "bodies cut off"
fallbacks=$(counter direct_fallbacks)
((fallbacks > 0)) || fail "nothing fell back"

sleep 5
mood stall
read_blocks 12
sleep 8
mood calm
all_read "a server that stalls"
(($(counter direct_fallbacks) > fallbacks)) || fail "a body that stalls is waited for too long"

# The daemon ends with bodies under way, and then dies so.
sleep 5
for signal in TERM KILL; do
    mood stall
    read_blocks 13
    sleep 1
    kill -"$signal" "$daemon"
    begun=$SECONDS
    wait "$daemon" 2>/dev/null || [[ $signal == KILL ]] || fail "the daemon did not end well"
    # A body has five seconds.
    ((SECONDS - begun < 3)) || fail "a daemon waits for bodies under way before it ends"
    mood calm
    start_daemon
    all_read "a daemon ended by SIG$signal"
    [[ $(quarry volume show "$volume") == *"direct reads    yes ("* ]] || fail "direct reads are not shown after SIG$signal"
done
cmp "$disk" /mnt/data || fail "the volume is not what was written"

# A daemon that is killed while it stops a device, which waits for a read that waits for the store, ends all the same; the
# next one serves the volume by another device, for of that one nothing is left.
sleep 5
quarry volume evict "$volume" >/dev/null
mood stall
dd if="$disk" of=/dev/null bs=64k skip=77 count=1 iflag=direct status=none 2>/dev/null &
reader=$!
sleep 0.5
"$QUARRY_BIN" volume detach "$volume" >/dev/null 2>&1 &
detacher=$!
sleep 1
kill -KILL "$daemon"
for _ in $(seq 100); do
    [[ $(find "/proc/$daemon/task" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l) -le 1 ]] && break
    sleep 0.1
done
[[ $(find "/proc/$daemon/task" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l) -le 1 ]] || fail "a daemon that stops a device cannot die"
wait "$daemon" 2>/dev/null || true
mood calm
start_daemon
wait "$reader" "$detacher" 2>/dev/null || true
disk=$(await_device)
cmp "$disk" /mnt/data || fail "the volume is not what was written"

quarry volume detach "$volume" --output json
quarry volume create acme/packed --size 1MiB
quarry volume attach acme/packed --via ublk --direct-reads 2>&1 | grep -q 'no direct reads: the volume was created with --compression lz4' ||
    fail "a wish that cannot be met is not told of"
quarry volume detach acme/packed
stop_daemon
say "passed"
