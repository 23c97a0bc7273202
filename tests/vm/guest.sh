# Functions for the scripts that run inside the guest; sourced by them.
#
# They expect: $QUARRY_BIN the program; $dir a directory for store, records and log (the host's, by hostfs);
# $state a directory for the daemon's own state; $cache the cache file or device; $cache_size; if wanted, $QUARRY_CONFIG
# and $store, the URL of another store than a folder in $dir.
# shellcheck shell=bash

set -euo pipefail
export QUARRY_SOCKET=/run/quarry.sock
# No udevd makes the nodes of dmsetup's devices here.
export DM_DISABLE_UDEV=1
volume=acme/disk
log=$dir/daemon.log
daemon=

say() { echo "guest: $*" >&2; }

fail() {
    say "FAILED: $*"
    say "the daemon's log ends so:"
    tail -n 60 "$log" >&2 || true
    exit 1
}

# With arguments: started by that command. What is in the array `flags` is given to the daemon.
flags=()
start_daemon() {
    rm -f "$QUARRY_SOCKET"
    launch_daemon "$@"
}

launch_daemon() {
    mkdir -p "$state" "$dir/store"
    "$@" "$QUARRY_BIN" serve ${QUARRY_CONFIG:+--config "$QUARRY_CONFIG"} --data-dir "$state" --store "${store:-file://$dir/store}" --cache "$cache" \
        --cache-size "$cache_size" --socket "$QUARRY_SOCKET" --listen "${listen:-127.0.0.1:9400}" "${flags[@]}" >>"$log" 2>&1 &
    daemon=$!
    for _ in $(seq 600); do
        # Itself, and not the one that it replaces.
        if [[ $("$QUARRY_BIN" status --output json 2>/dev/null) =~ \"pid\":\ *$daemon, ]]; then
            return
        fi
        kill -0 "$daemon" 2>/dev/null || fail "the daemon ended at once"
        sleep 0.1
    done
    fail "the daemon is not ready after a minute"
}

# Another daemon takes over from the one that runs, prepared before that one is stopped.
replace_daemon() {
    local old=$daemon flags=(--replace)
    launch_daemon
    wait "$old" || fail "the daemon that was replaced did not end well"
}

kill_daemon() {
    kill -KILL "$daemon"
    wait "$daemon" 2>/dev/null || true
    say "daemon killed"
}

stop_daemon() {
    kill "$daemon"
    wait "$daemon" || fail "the daemon did not end well"
}

quarry() {
    "$QUARRY_BIN" "$@" || fail "quarry $*"
}

# The attached volume's block device.
device() {
    local shown
    shown=$(quarry volume show "$volume" --output json)
    [[ $shown =~ (/dev/ublkb[0-9]+) ]] || fail "no ublk device in $shown"
    echo "${BASH_REMATCH[1]}"
}

# Waits until the attached volume's device is there and answers a read, and prints its name.
await_device() {
    local name
    for _ in $(seq 300); do
        name=$(device)
        if [[ -b $name ]] && timeout 30 dd if="$name" of=/dev/null bs=4096 count=1 iflag=direct status=none; then
            echo "$name"
            return
        fi
        sleep 0.1
    done
    fail "no working device for $volume"
}

# Told each time how many files are promised.
promised() { :; }

# Files fN, each made, synced and given its name in a synced directory before its sum is recorded: from then on it is
# promised. Ends when $dir/enough appears.
write_files() {
    local at=$1 record=$2 number=$3 file
    while [[ ! -e $dir/enough ]]; do
        file=$at/f$number
        head -c $((RANDOM * 6 + 1)) /dev/urandom >"$file.new" || return 1
        sync "$file.new" || return 1
        mv "$file.new" "$file" && sync "$at" || return 1
        echo "$(md5sum <"$file" | cut -d' ' -f1) f$number" >>"$record"
        sync "$record"
        promised "$((number + 1))"
        # Some unsynced work beside it: overwrites and deletions that keep the file system busy.
        head -c 50000 /dev/urandom >"$at/scratch$((number % 3))"
        if ((number % 5 == 4)); then rm -f "$at/scratch0"; fi
        number=$((number + 1))
    done
}

# Every recorded file is there with its bytes.
check_files() {
    local at=$1 record=$2
    if [[ -s $record ]]; then
        # A second blank, as it makes them itself.
        (cd "$at" && sed 's/ /  /' "$record" | md5sum --check --quiet --strict >&2) || fail "files are lost or wrong"
    fi
    say "$(wc -l <"$record") synced files are right"
}

check_clean() {
    e2fsck -f -n "$1" >"$dir/e2fsck.log" 2>&1 || { cat "$dir/e2fsck.log" >&2; fail "the file system is not clean"; }
    say "e2fsck: clean"
}
