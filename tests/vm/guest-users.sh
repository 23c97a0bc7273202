#!/usr/bin/env bash
# In the guest: one life of a host whose volume has an XFS with a PostgreSQL, two SQLite databases and a git repository in
# use. In the first life the daemon is killed, once together with PostgreSQL, and the power is cut at its end. Whatever any of them was
# told that it is committed is there, and each one's own checker finds nothing. The cache is /dev/ubda, which outlives the guest.
# usage: guest-users.sh DIRECTORY first COMMITS, then: guest-users.sh DIRECTORY last
dir=$1 life=$2 commits=${3:-}
state=$dir/state cache=/dev/ubda cache_size=256MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
fs=/mnt/fs
kept=$dir/kept
mkdir -p "$kept"
touch "$kept"/{postgres,wal,rollback,git}
export HOME=/mnt PGHOST=/mnt/pg-socket PGUSER=quarry PGDATABASE=postgres PGOPTIONS='-c client_min_messages=warning'
pg=$(printf '%s\n' /usr/lib/postgresql/*/bin | tail -n 1)
# PostgreSQL does not run as root.
as_nobody() { setpriv --reuid=nobody --regid=nogroup --clear-groups "$@"; }

# Appended and synced: from then on it is promised. The host's file system keeps it over a power cut.
keep() { # FILE LINE
    echo "$2" >>"$kept/$1"
    sync "$kept/$1"
}
last() { tail -n 1 "$kept/$1"; }

start_postgres() {
    install -d -o nobody -g nogroup "$PGHOST"
    rm -f "$PGHOST"/.s.* "$fs/pg/postmaster.pid"
    as_nobody "$pg/pg_ctl" --pgdata "$fs/pg" --wait --timeout 60 --silent --log /mnt/pg-socket/log start ||
        { cat /mnt/pg-socket/log >&2; fail "PostgreSQL does not start"; }
    postmaster=$(head -n 1 "$fs/pg/postmaster.pid")
}
stop_postgres() {
    as_nobody "$pg/pg_ctl" --pgdata "$fs/pg" --wait --silent --mode fast stop || fail "PostgreSQL does not stop"
}
ask() { as_nobody "$pg/psql" --no-psqlrc --quiet --tuples-only --no-align -v ON_ERROR_STOP=1 --command "$1"; }

make_all() {
    install -d -o nobody -g nogroup "$fs/pg"
    as_nobody "$pg/initdb" --pgdata "$fs/pg" --username quarry --auth trust --data-checksums --no-instructions \
        --locale C >/mnt/initdb 2>&1 || { cat /mnt/initdb >&2; fail "initdb"; }
    printf '%s\n' "listen_addresses = ''" "unix_socket_directories = '$PGHOST'" 'shared_buffers = 16MB' \
        'max_wal_size = 64MB' 'checkpoint_timeout = 30s' >>"$fs/pg/postgresql.conf"
    start_postgres
    ask 'create extension amcheck; create table kept (n int primary key, filler text)' || fail "create"
    as_nobody "$pg/pgbench" --initialize --quiet --scale 1 2>/mnt/pgbench || { cat /mnt/pgbench >&2; fail "pgbench -i"; }
    sqlite3 "$fs/wal.db" 'pragma journal_mode = wal; create table a (n integer primary key); create table b (n integer primary key, filler blob)' >/dev/null
    sqlite3 "$fs/rollback.db" 'pragma journal_mode = delete; create table a (n integer primary key); create table b (n integer primary key, filler blob)' >/dev/null
    git init -q --initial-branch main "$fs/repository"
    git -C "$fs/repository" config user.name quarry
    git -C "$fs/repository" config user.email quarry@example.org
    git -C "$fs/repository" config core.fsync all
    sync -f "$fs"
}

# Each goes on where it was, until the file /mnt/enough is there or it sees an error, which is only said: PostgreSQL's
# end is one. What was not said to be committed may be there all the same.
use_postgres() {
    local n said
    coproc psql { as_nobody "$pg/psql" --no-psqlrc --quiet --tuples-only --no-align -v ON_ERROR_STOP=1; }
    echo 'select coalesce(max(n), 0) from kept;' >&"${psql[1]}"
    read -r n <&"${psql[0]}" || return 1
    while [[ ! -e /mnt/enough ]]; do
        n=$((n + 1))
        echo "insert into kept values ($n, repeat('x', 1000)) returning n;" >&"${psql[1]}"
        read -r said <&"${psql[0]}" && [[ $said == "$n" ]] || return 1
        keep postgres "$n"
    done
}
# Extra: else it does not sync the directory of a rollback journal whose removal is the commit.
use_sqlite() { # NAME
    local n
    n=$(sqlite3 "$fs/$1.db" 'select coalesce(max(n), 0) from a') || return 1
    while [[ ! -e /mnt/enough ]]; do
        n=$((n + 1))
        sqlite3 "$fs/$1.db" "pragma synchronous = extra; begin; insert into a values ($n); insert into b values ($n, randomblob(9000)); commit" || return 1
        keep "$1" "$n"
    done
}
use_git() {
    while [[ ! -e /mnt/enough ]]; do
        head -c 20000 /dev/urandom >"$fs/repository/file$((RANDOM % 10))"
        git -C "$fs/repository" add . || return 1
        git -C "$fs/repository" commit -q -m work || return 1
        # It does not sync the directory of what it renames.
        sync -f "$fs/repository" || return 1
        keep git "$(git -C "$fs/repository" rev-parse HEAD)"
    done
}
users=()
use_all() {
    rm -f /mnt/enough
    as_nobody "$pg/pgbench" --no-vacuum --client 2 --time 600 >/mnt/pgbench 2>&1 &
    bench=$!
    use_postgres 2>/mnt/use_postgres &
    postgres=$!
    users=()
    use_sqlite wal & users+=($!)
    use_sqlite rollback & users+=($!)
    use_git & users+=($!)
}

# Until each has been told of a few commits more.
await_work() { # COMMITS
    local name before
    declare -A before
    for name in postgres wal rollback git; do before[$name]=$(wc -l <"$kept/$name"); done
    for _ in $(seq 600); do
        sleep 0.1
        for name in postgres wal rollback git; do
            (($(wc -l <"$kept/$name") >= before[$name] + $1)) || continue 2
        done
        return
    done
    fail "too little work: $(wc -l "$kept"/*)"
}

check_postgres() {
    local sums
    [[ $(ask 'select coalesce(max(n), 0) from kept') -ge $(last postgres) ]] || fail "PostgreSQL lost what it had committed"
    [[ $(ask 'select count(*) = coalesce(max(n), 0) from kept') == t ]] || fail "rows are missing"
    sums=$(ask 'select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)')
    [[ $sums =~ ^(-?[0-9]+)\|(-?[0-9]+)\|(-?[0-9]+)\|(-?[0-9]+)$ ]] || fail "sums: $sums"
    [[ $(tr '|' '\n' <<<"$sums" | sort -u | wc -l) == 1 ]] || fail "the balances differ: $sums"
    as_nobody "$pg/pg_amcheck" --all --heapallindexed 2>/mnt/amcheck || { cat /mnt/amcheck >&2; fail "pg_amcheck"; }
    say "PostgreSQL: $(last postgres) rows promised, $(ask 'select count(*) from pgbench_history') transactions of pgbench, sums are right"
}
check_sqlite() { # NAME
    local found
    found=$(sqlite3 "$fs/$1.db" 'pragma integrity_check; select count(*) = coalesce(max(n), 0) from a; select count(*) from a; select count(*) from b' | tr '\n' ' ')
    [[ $found =~ ^ok\ 1\ ([0-9]+)\ ([0-9]+)\ $ && ${BASH_REMATCH[1]} == "${BASH_REMATCH[2]}" ]] || fail "SQLite, $1: $found"
    ((BASH_REMATCH[1] >= $(last "$1"))) || fail "SQLite, $1: it lost what it had committed"
    say "SQLite, $1: ${BASH_REMATCH[1]} transactions"
}
check_git() {
    rm -f "$fs/repository/.git/"*.lock "$fs/repository/.git/refs/heads/"*.lock
    git -C "$fs/repository" fsck --full --strict >/mnt/fsck 2>&1 || { cat /mnt/fsck >&2; fail "git fsck"; }
    git -C "$fs/repository" merge-base --is-ancestor "$(last git)" HEAD || fail "git lost a commit"
    git clone -q "$fs/repository" /mnt/clone || fail "git clone"
    (($(git -C /mnt/clone rev-list --count HEAD) >= $(wc -l <"$kept/git"))) || fail "git lost commits"
    rm -rf /mnt/clone
    say "git: $(git -C "$fs/repository" rev-list --count HEAD) commits"
}
check_all() {
    check_postgres
    check_sqlite wal
    check_sqlite rollback
    check_git
}

start_daemon
mkdir "$fs"
if [[ $life == last ]]; then
    disk=$(await_device)
    mount "$disk" "$fs" || fail "mount"
    start_postgres
    check_all
    stop_postgres
    as_nobody "$pg/pg_checksums" --check --pgdata "$fs/pg" >/mnt/checksums || { cat /mnt/checksums >&2; fail "pg_checksums"; }
    umount "$fs" || fail "umount"
    xfs_repair -n "$disk" >/mnt/xfs_repair 2>&1 || { cat /mnt/xfs_repair >&2; fail "the XFS is not clean"; }
    say "passed, and xfs_repair finds nothing"
    exit 0
fi

quarry tenant create acme
quarry volume create "$volume" --size 1GiB
quarry volume attach "$volume" --via ublk
disk=$(await_device)
mkfs.xfs -q "$disk" || fail "mkfs.xfs"
mount "$disk" "$fs" || fail "mount"
make_all
use_all
await_work "$commits"
# Both at once: PostgreSQL recovers from a device whose daemon is a new one.
kill -KILL "$postmaster"
kill_daemon
start_daemon
for user in "${users[@]}"; do kill -0 "$user" || fail "an error was seen over a kill"; done
# They end with it, by errors that are none of ours.
wait "$bench" "$postgres" || true
start_postgres
touch /mnt/enough
wait "${users[@]}" || fail "an error was seen over a kill"
check_all
use_all
await_work "$commits"
kill_daemon
start_daemon
await_work 1
for user in "$bench" "$postgres" "${users[@]}"; do kill -0 "$user" || fail "an error was seen over a kill: $(cat /mnt/pgbench /mnt/use_postgres)"; done
say "cutting the power"
echo 0 >"$GUEST_STATUS"
sync "$GUEST_STATUS"
busybox poweroff -n -f
