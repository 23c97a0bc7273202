#!/usr/bin/env bash
# In the guest: what the cache lacks, read by ublk, beside a bare client of the same S3 server, which is in the guest too, in turns.
# Prints lines of: cold bare|quarry|direct ROUND MIB_A_SECOND|- MEDIAN_US. "direct" is a volume attached with --direct-reads.
# usage: guest-cold.sh DIRECTORY ROUNDS BENCH
dir=$1 rounds=$2 bench=$3
state=/mnt/state cache=/mnt/cache cache_size=960MiB
# shellcheck source=../vm/guest.sh
source "$(dirname "$0")/../vm/guest.sh"
# shellcheck source=guest-store.sh
source "$(dirname "$0")/guest-store.sh"
size_mib=256

# VOLUME OPTIONS...: of fio, on what the cache lacks, in JSON.
cold() {
    local volume=$1
    shift
    quarry volume evict "$volume" >/dev/null
    fio --name=c --filename="/dev/quarry/$volume" --direct=1 --size=${size_mib}m --output-format=json --eta=never "$@" >/mnt/fio.json
}
told() { # EXPRESSION: of what fio read.
    python3 -c "import json; read = json.load(open('/mnt/fio.json'))['jobs'][0]['read']; print(round($1))"
}
# VOLUME: the median of 500 reads of 4 KiB, one after the other, in microseconds.
one_by_one() {
    cold "$1" --ioengine=psync --rw=randread --bs=4k --io_size=2000k --randrepeat=0
    told "read['clat_ns']['percentile']['50.000000'] / 1000"
}
counter() { # METRIC: of the volume with direct reads.
    busybox wget -q -O - http://127.0.0.1:9400/metrics | awk -v m="quarry_volume_$1_total{" -v v='volume="direct"' 'index($0, m) == 1 && index($0, v) { print $2 }'
}

start_server
start_daemon
quarry tenant create acme
for name in disk direct; do
    quarry volume create acme/$name --size ${size_mib}MiB --compression none >/dev/null
    [[ $name == direct ]] && flag=--direct-reads || flag=
    # shellcheck disable=SC2086 # none, or one
    quarry volume attach acme/$name --via ublk $flag >/dev/null 2>&1
    fio --name=fill --filename=/dev/quarry/acme/$name --ioengine=io_uring --direct=1 --size=${size_mib}m --rw=write --bs=1m \
        --iodepth=4 --minimal --eta=never --output=/dev/null
    quarry volume sync acme/$name >/dev/null 2>&1
done
for round in $(seq "$rounds"); do
    read -r whole range _ < <("$bench" bare "$address" --mib $size_mib) || fail "the bare client"
    echo "cold bare $round $whole $range"
    cold acme/disk --ioengine=io_uring --rw=read --bs=1m --iodepth=8
    sequential=$(told "read['bw_bytes'] / (1 << 20)")
    echo "cold quarry $round $sequential $(one_by_one acme/disk)"
    before=$(counter direct_reads)
    median=$(one_by_one acme/direct)
    (($(counter direct_reads) - before > 400)) || fail "reads were not direct"
    echo "cold direct $round - $median"
done
for name in disk direct; do quarry volume detach acme/$name >/dev/null 2>&1; done
stop_daemon
stop_server
