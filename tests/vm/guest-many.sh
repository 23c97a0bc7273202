#!/usr/bin/env bash
# In the guest: many attached devices on one reactor. They cost no thread, little memory and no time while they are idle;
# those past the reactor's buffer table are served without copies too; all of them outlive the daemon.
# usage: guest-many.sh DIRECTORY DEVICES
dir=$1 devices=$2
state=/mnt/state cache=/mnt/cache cache_size=2GiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"

# What the daemon's process costs: threads, resident KiB, CPU ticks, context switches of its one reactor.
cost() {
    local threads memory ticks switches
    threads=$(ls "/proc/$daemon/task" | wc -l)
    memory=$(awk '/^RssAnon/ { print $2 }' "/proc/$daemon/status")
    ticks=$(awk '{ print $14 + $15 }' "/proc/$daemon/stat")
    switches=$(cat /proc/"$daemon"/task/*/status | awk '/^Name:/ { mine = $2 == "reactor-0" } /ctxt_switches/ && mine { n += $2 } END { print n }')
    echo "$threads $memory $ticks $switches"
}

# Each device of a number below $devices: makes and attaches its volume, or writes and reads it back.
each() {
    python3 - "$QUARRY_SOCKET" "$devices" "$1" <<'PY'
import http.client, json, mmap, os, socket, sys
path, count, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]

class Control(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)

def call(method, url, body=None):
    control = Control("quarry")
    control.request(method, url, json.dumps(body), {"content-type": "application/json"})
    answer = control.getresponse()
    text = answer.read()
    if answer.status >= 300:
        sys.exit(f"{method} {url}: {answer.status} {text}")

page = mmap.mmap(-1, 65536)
for n in range(count):
    if what == "attach":
        call("POST", "/v1/volumes", {"tenant": "acme", "name": f"v{n}", "size_bytes": 1 << 30})
        call("POST", f"/v1/volumes/acme/v{n}/attach", {"via": "ublk"})
    else:
        device = os.open(f"/dev/quarry/acme/v{n}", os.O_RDWR | os.O_DIRECT)
        wanted = bytes([n % 251 + 1]) * 65536
        if what == "write":
            page[:] = wanted
            os.pwritev(device, [page], 65536 * n)
        else:
            os.preadv(device, [page], 65536 * n)
            if page[:] != wanted:
                sys.exit(f"device {n} has other data")
        os.close(device)
PY
}

sum_of() { # METRIC: over all volumes
    busybox wget -q -O - http://127.0.0.1:9400/metrics | awk -v m="$1{" 'index($0, m) == 1 { n += $NF } END { print n + 0 }'
}

# Each volume that is written to has a segment of its own, which must not be sent away and fetched again here.
printf '[reactor]\nthreads = 1\n[cache]\ndirty_max = "95%%"\n' >/mnt/quarry.toml
export QUARRY_CONFIG=/mnt/quarry.toml
start_daemon
quarry tenant create acme
# Threads that the runtime makes when they are first needed are there then.
quarry volume create acme/first --size 1GiB
quarry volume attach acme/first --via ublk
read -r threads memory _ _ <<<"$(cost)"
started=$SECONDS
each attach || fail "attach"
say "$devices devices attached in $((SECONDS - started)) s"
sleep 2
read -r threads_now memory_now ticks switches <<<"$(cost)"
sleep 10
read -r threads_later _ ticks_later switches_later <<<"$(cost)"
journals=$(du -sk "$(dirname "$QUARRY_SOCKET")"/quarry/journal 2>/dev/null | cut -f1)
say "idle: $((threads_now - threads)) threads more, $(((memory_now - memory) / devices)) KiB of memory and" \
    "$((${journals:-0} / devices)) KiB of journal a device;" \
    "$((ticks_later - ticks)) ms of CPU a second and $(((switches_later - switches) / 10)) context switches of the reactor a second, all together"
# The runtime's pool may be a thread or two larger than it was; two hundred devices must not be.
((threads_now - threads < 8 && threads_later - threads < 8)) || fail "devices cost threads"
(((memory_now - memory) / devices < 256)) || fail "a device costs too much memory"
((ticks_later - ticks < 50)) || fail "idle devices cost time: $((ticks_later - ticks)) ticks in 10 s"

each write || fail "write"
each read || fail "read"
(($(sum_of quarry_volume_copied_bytes_total) == 0)) || fail "data were copied"
by_hand=$(busybox wget -q -O - http://127.0.0.1:9400/metrics | grep -c '^quarry_volume_info.*mode="zero copy by hand"' || true)
((by_hand == (devices + 1 > 120 ? devices + 1 - 120 : 0))) || fail "$by_hand devices register by hand"
kill_daemon
started=$SECONDS
start_daemon
for _ in $(seq 600); do
    (($(sum_of quarry_reactor_volumes) == devices + 1)) && break
    sleep 0.1
done
each read || fail "read after a kill"
say "all taken over after $((SECONDS - started)) s"
# Each at once, and none because a call to the store ran out of time.
! grep "cannot be attached again yet" "$log" || fail "a volume did not come back at its first try"
(($(sum_of quarry_volume_copied_bytes_total) == 0)) || fail "data were copied after a kill"
stop_daemon
say "passed"
