#!/usr/bin/env bash
# In a clean Debian that boot-root booted: the life of the package. In the first boot it is installed and configured, and
# two volumes get file systems and lines in fstab; in the second these are mounted by then, the package is upgraded and
# the daemon is reloaded, restarted, killed and hung under load, and the package is removed and purged.
# usage: guest-install.sh first PACKAGE, then: guest-install.sh second PACKAGE (of a higher version)
# shellcheck shell=bash
set -uo pipefail
life=$1 package=/host$2
export DEBIAN_FRONTEND=noninteractive
config=/etc/quarry/quarry.toml
cd /

say() { echo "guest: $*"; }
fio=
fail() {
    say "FAILED: $*"
    # Else the power cannot be turned off in good order.
    [[ -n $fio ]] && kill -KILL "$fio" && wait "$fio"
    umount /host/mnt /host/dev
    systemctl --no-pager --full status quarry.service
    journalctl --no-pager --boot --unit=quarry.service --unit='quarry-volume@*' --lines=60
    exit 1
}
shown() { systemctl show --property="$1" --value quarry.service; }
main_pid() { shown MainPID; }
await() { # WHAT COMMAND...: for a minute
    local what=$1
    shift
    for _ in $(seq 300); do
        "$@" && return
        sleep 0.2
    done
    fail "$what: not within a minute"
}
install_and_configure() {
    apt-get install -y --no-install-recommends "$package" || fail "apt-get install"
    for file in /usr/share/man/man1/quarry.1.gz /usr/share/man/man1/quarry-volume-attach.1.gz \
        /usr/share/bash-completion/completions/quarry /usr/share/zsh/vendor-completions/_quarry \
        /usr/share/fish/vendor_completions.d/quarry.fish /usr/share/doc/quarry/examples/quarry.toml; do
        [[ -s $file ]] || fail "no $file"
    done
    bash -n /usr/share/bash-completion/completions/quarry || fail "the completions are no shell"
    getent group quarry >/dev/null || fail "no group"
    quarry config check /usr/share/doc/quarry/examples/quarry.toml || fail "the example"
    [[ $(systemctl is-enabled quarry.service) == enabled ]] || fail "not enabled"

    # Without a store it says what to do, once.
    systemctl start quarry.service 2>/dev/null && fail "started without a store"
    sleep 2
    [[ $(shown ActiveState) == failed && $(shown ExecMainStatus) == 78 && $(shown NRestarts) == 0 ]] || fail "without a store"
    journalctl --boot --unit=quarry.service --output=cat | grep -q 'store.url is not set' || fail "it does not say what is missing"

    sed -i 's|^#url = .*|url = "file:///srv/store"|; s|^#size = .*|size = "256MiB"|' "$config"
    quarry config check "$config" || fail "the configuration"
    systemctl start quarry.service || fail "the service does not start"
    [[ $(stat --format='%a %U %G' /run/quarry/quarry.sock) == "660 root quarry" ]] || fail "the socket: $(stat /run/quarry/quarry.sock)"
    setpriv --reuid=nobody --regid=nogroup --groups=quarry quarry status || fail "a member of the group is refused"
    setpriv --reuid=nobody --regid=nogroup --clear-groups quarry status && fail "anybody is let in"
    systemd-analyze security --no-pager quarry.service | tail -n 1
    systemd-analyze security --no-pager --threshold=50 quarry.service >/dev/null || fail "less hardened than it was"

    quarry tenant create acme || fail "tenant"
    for name in db my-db; do
        local unit where=/srv/$name
        unit=$(systemd-escape --template=quarry-volume@.service "acme/$name")
        quarry volume create "acme/$name" --size 256MiB || fail "volume"
        systemctl start "$unit" || fail "$unit"
        # Again, and by another who attached it.
        systemctl restart "$unit" || fail "$unit again"
        [[ $(cat "/sys/block/$(basename "$(readlink -f "/dev/quarry/acme/$name")")/queue/scheduler") == "[none]"* ]] || fail "it has a scheduler"
        mkfs.ext4 -q "/dev/quarry/acme/$name" || fail "mkfs"
        mkdir "$where"
        echo "/dev/quarry/acme/$name $where ext4 x-systemd.requires=$unit,_netdev,nofail,x-systemd.device-timeout=16min 0 2" >>/etc/fstab
    done
    cat /etc/fstab
    systemctl daemon-reload
    systemctl start srv-db.mount 'srv-my\x2ddb.mount' || fail "mount"
    for name in db my-db; do
        head -c 20000000 /dev/urandom >"/srv/$name/kept"
        md5sum "/srv/$name/kept" >>/root/kept
    done
    say "first: passed"
}

is_another() { # than PID, and serving
    local now
    now=$(main_pid)
    [[ $now != "$1" && $now != 0 ]] && systemctl --quiet is-active quarry.service && quarry status 2>/dev/null | grep -q . &&
        dd if=/dev/quarry/acme/db of=/dev/null bs=4096 count=1 iflag=direct status=none
}
look() { # AFTER: nobody has noticed anything
    kill -0 "$fio" 2>/dev/null || { cat /root/fio.out; fail "fio saw an error or wrong data after $1"; }
    sleep 1
    kill -0 "$fio" 2>/dev/null || { cat /root/fio.out; fail "fio saw an error or wrong data after $1"; }
    for name in db my-db; do mountpoint -q "/srv/$name" || fail "not mounted after $1"; done
    say "$1: seen by nobody"
}

upgrade_and_remove() {
    systemctl --failed --no-legend --no-pager | grep . && fail "units failed at boot"
    for name in db my-db; do mountpoint -q "/srv/$name" || fail "/srv/$name was not mounted at boot"; done
    md5sum --quiet --check /root/kept || fail "files are lost or wrong"
    say "mounted at boot"

    # The host's program, at what the host's tree has as /mnt: seen from here only.
    mount --bind /dev /host/dev
    mount --bind /srv/db /host/mnt
    chroot /host fio --name=load --directory=/mnt --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=16 \
        --size=64m --io_size=100g --verify=crc32c --verify_backlog=256 --verify_fatal=1 --verify_state_save=0 \
        --runtime=1h --time_based --minimal --eta=never >/root/fio.out 2>&1 &
    fio=$!
    sleep 2
    look "starting fio"

    local before
    before=$(main_pid)
    apt-get install -y "$package" || fail "the upgrade"
    is_another "$before" || fail "the daemon is not another after the upgrade"
    [[ $(shown Result) == success && $(shown NRestarts) == 0 ]] || fail "not a takeover"
    [[ -d /proc/$before ]] && fail "the daemon before the upgrade is still there"
    look "the upgrade"

    # What cannot serve does not end what does.
    before=$(main_pid)
    cp "$config" /root/quarry.toml
    echo 'nonsense = 1' >>"$config"
    systemctl reload quarry.service 2>/dev/null && fail "reloaded nonsense"
    [[ $(main_pid) == "$before" ]] && systemctl --quiet is-active quarry.service || fail "a reload that failed ended the daemon"
    cp /root/quarry.toml "$config"
    look "a reload that failed"

    systemctl restart quarry.service || fail "restart"
    is_another "$before" || fail "not restarted"
    journalctl --boot --unit=quarry.service --output=cat | grep 'code=killed' && fail "killed rather than stopped"
    look "a restart"

    before=$(main_pid)
    kill -KILL "$before"
    await "a daemon after a kill" is_another "$before"
    look "a kill"

    # One thread alone hangs: a reactor, stopped by a tracer.
    mkdir -p /run/systemd/system/quarry.service.d
    printf '[Service]\nWatchdogSec=4s\n' >/run/systemd/system/quarry.service.d/test.conf
    systemctl daemon-reload
    systemctl restart quarry.service || fail "restart with a short watchdog"
    before=$(main_pid)
    sleep 6
    [[ $(main_pid) == "$before" ]] || fail "the watchdog bit a daemon that is well"
    local thread
    thread=$(basename "$(dirname "$(grep -l '^reactor-0$' "/proc/$before/task/"*/comm)")")
    # PTRACE_SEIZE and PTRACE_INTERRUPT; then wait (__WALL) for its end, without which nobody sees the process end.
    perl -e 'my $t = shift; syscall(101, 0x4206, $t + 0, 0, 0) == 0 or die "seize: $!";
        syscall(101, 0x4207, $t + 0, 0, 0) == 0 or die "interrupt: $!"; 1 while waitpid($t, 0x40000000) > 0' "$thread" &
    local tracer=$!
    await "a daemon after one that hung" is_another "$before"
    kill "$tracer" 2>/dev/null
    journalctl --boot --unit=quarry.service --output=cat | grep -q 'Watchdog timeout' || fail "it was not the watchdog"
    look "a reactor that hung"

    kill -INT "$fio"
    wait "$fio" || [[ $? == 128 ]] || { cat /root/fio.out; fail "fio ended badly"; }
    umount /host/mnt /host/dev || fail "umount of the host's"
    [[ $(grep '^3;' /root/fio.out | cut -d';' -f5) == 0 ]] || { cat /root/fio.out; fail "fio saw an error"; }
    md5sum --quiet --check /root/kept || fail "files are lost or wrong in the end"

    apt-get remove -y quarry && fail "removed while volumes are attached"
    systemctl --quiet is-active quarry.service || fail "a removal that was refused ended the daemon"
    for name in db my-db; do
        local device
        device=$(readlink -f "/dev/quarry/acme/$name")
        umount "/srv/$name" || fail "umount"
        e2fsck -f -n "$device" || fail "the file system is not clean"
        systemctl stop "$(systemd-escape --template=quarry-volume@.service "acme/$name")" || fail "detach"
        [[ ! -e $device ]] || fail "the device is still there"
    done
    apt-get remove -y quarry || fail "remove"
    pgrep quarry >/dev/null 2>&1 && fail "a daemon is left"
    [[ ! -e /usr/bin/quarry && -e $config && -e /var/lib/quarry/cache ]] || fail "remove took or left too much"
    apt-get purge -y quarry || fail "purge"
    [[ ! -e $config && ! -e /etc/default/quarry && -e /var/lib/quarry/cache ]] || fail "purge took or left too much"
    say "second: passed"
}

case $life in
first) install_and_configure ;;
second) upgrade_and_remove ;;
esac
