#!/usr/bin/env bash
# In the guest: the 99th percentile of one volume's 4 KiB hits, alone and beside another volume of the same reactor whose
# every read waits for the store, in turns. Prints a line a round: isolation ALONE BESIDE, in microseconds.
# usage: guest-isolation.sh DIRECTORY ROUNDS SECONDS BENCH
# The store is an S3 server in the guest, which is stopped: it takes connections and never answers.
dir=$1 rounds=$2 seconds=$3 bench=$4
state=/mnt/state cache=/mnt/cache cache_size=256MiB
# shellcheck source=../vm/guest.sh
source "$(dirname "$0")/../vm/guest.sh"
# shellcheck source=guest-store.sh
source "$(dirname "$0")/guest-store.sh"

node() { readlink -f "/dev/quarry/acme/$1"; }

# 99th percentile of completion latency, in microseconds.
p99() {
    fio --name=p --filename="$(node lively)" --ioengine=io_uring --direct=1 --rw=randread --bs=4k --iodepth=1 --size=64m \
        --runtime="$seconds" --time_based --norandommap --randrepeat=0 --output-format=json --eta=never |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["jobs"][0]["read"]["clat_ns"]["percentile"]["99.000000"] / 1000)'
}

start_server
start_daemon
quarry tenant create acme
quarry volume create acme/stuck --size 64MiB --compression none >/dev/null
quarry volume attach acme/stuck --via ublk >/dev/null
fio --name=f --filename="$(node stuck)" --rw=write --bs=1m --size=64m --direct=1 --minimal --output=/dev/null
quarry volume detach acme/stuck
stop_daemon
rm -rf "$state" "$cache"
start_daemon
quarry volume create acme/lively --size 64MiB >/dev/null
quarry volume attach acme/lively --via ublk >/dev/null
fio --name=f --filename="$(node lively)" --rw=write --bs=1m --size=64m --direct=1 --minimal --output=/dev/null
quarry volume sync acme/lively
quarry volume detach acme/lively >/dev/null 2>&1

for _ in $(seq "$rounds"); do
    # What the last round fetched is forgotten with a restart.
    stop_daemon
    start_daemon
    for name in lively stuck; do quarry volume attach "acme/$name" --via ublk >/dev/null 2>&1; done
    dd if="$(node lively)" of=/dev/null bs=1M iflag=direct status=none
    kill -STOP "$server_PID"
    alone=$(p99)
    fio --name=s --filename="$(node stuck)" --ioengine=io_uring --direct=1 --rw=read --bs=1m --iodepth=24 --size=24m \
        --minimal --output=/dev/null >/dev/null 2>&1 &
    reader=$!
    sleep 0.5
    beside=$(p99)
    read -r inflight _ <"/sys/block/$(basename "$(node stuck)")/inflight"
    ((inflight == 24)) || fail "$inflight reads were stuck, not 24"
    echo "isolation $alone $beside"
    kill -CONT "$server_PID"
    wait "$reader" || fail "a read that was stuck failed in the end"
    for name in lively stuck; do quarry volume detach "acme/$name" >/dev/null 2>&1; done
done
stop_daemon
stop_server
