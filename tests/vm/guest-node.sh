#!/usr/bin/env bash
# In the guest: names, owners and modes of devices, right after attaching, after the daemon was killed, and gone after
# detaching; on a host without udev, and beside a udevd that has the rule or has it not.
# Ends with 77, and the reason on a line of its own, if udevd cannot run here.
# usage: guest-node.sh DIRECTORY alone|udev
dir=$1 way=$2
state=/mnt/state cache=/mnt/cache cache_size=128MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
rule=$(dirname "$0")/../../gateway/udev/60-quarry.rules
user=daemon group=video
wanted="$(id -u $user):$(getent group $group | cut -d: -f3) 640"
access=(--owner "$user:$group" --mode 0640)

permissions() { stat -L -c '%u:%g %a' "$1"; }
node() { readlink -f "/dev/quarry/acme/$1"; }
told() { echo "/run/quarry/udev/$(basename "$1")"; }
# What VOLUME's device is to have, WHEN.
expect() {
    local volume=$1 permissions=$2 when=$3
    [[ -b $(node "$volume") ]] || fail "$volume has no name $when"
    [[ $(permissions "/dev/quarry/acme/$volume") == "$permissions" ]] ||
        fail "$volume has $(permissions "/dev/quarry/acme/$volume"), not $permissions, $when"
}
expect_gone() { # VOLUME NODE
    [[ ! -e $2 && ! -L /dev/quarry/acme/$1 && ! -e $(told "$2") ]] || fail "something of $1 is left after detaching"
}
refused() { # TEXT ARGUMENT...
    local text=$1 said
    shift
    said=$("$QUARRY_BIN" volume attach "$@" 2>&1) && fail "not refused: $*"
    [[ $said == *"$text"* ]] || fail "refused with other words: $said"
}

without_udev() {
    quarry volume attach acme/given --via ublk "${access[@]}"
    expect given "$wanted" "after attaching"
    quarry volume attach acme/plain
    expect plain "0:0 600" "after attaching"
    [[ $(quarry volume show acme/given) == *"device owner"*"$user:$group"*"device mode"*0640* ]] || fail "owner and mode are not shown"
    [[ $(stat -c '%u %a' /run/quarry/udev) == "0 755" ]] || fail "others can forge what udev is told"
    quarry volume detach acme/plain

    refused 'no user "nobody-here"' acme/plain --owner nobody-here
    refused 'no group "nobody-here"' acme/plain --owner "$user:nobody-here"
    refused 'by NBD' acme/plain --via nbd --mode 0600
    [[ $(quarry volume show acme/plain) == *detached* ]] || fail "a refused attach has changed something"

    local given
    given=$(node given)
    chown 0:0 "$given" && chmod 600 "$given"
    : >/run/quarry/udev/ublkb77
    kill_daemon
    start_daemon
    expect given "$wanted" "after a kill"
    [[ $(node given) == "$given" ]] || fail "the device has another number after a kill"
    [[ ! -e /run/quarry/udev/ublkb77 ]] || fail "what udev was told of a device that is gone stays"
    chmod 600 "$given"
    stop_daemon
    # Anybody could forge what udev is told: a device is taken over all the same, but no new one is made.
    chmod 775 /run/quarry/udev
    start_daemon
    expect given "$wanted" "after a replacement"
    refused /run/quarry/udev acme/plain --via ublk
    [[ $(echo /dev/ublkb*) == "$given" ]] || fail "a failed attach has left a device"
    chmod 755 /run/quarry/udev
    quarry volume detach acme/given
    expect_gone given "$given"
    stop_daemon

    # A daemon that must not give files away makes no device that belongs to somebody else.
    start_daemon setpriv --bounding-set -chown
    refused CAP_CHOWN acme/given "${access[@]}"
    expect_gone given "$given"
    [[ $(quarry volume show acme/given) == *detached* ]] || fail "a failed attach is not undone"
    quarry volume attach acme/given --via ublk --mode 0604
    expect given "0:0 604" "after attaching by a daemon without CAP_CHOWN"
    quarry volume detach acme/given
    stop_daemon
    start_daemon
    quarry volume attach acme/given --via ublk "${access[@]}"
    stop_daemon
    # To take a device over it must do without: the device has users.
    chown 0:0 "$given"
    start_daemon setpriv --bounding-set -chown
    expect given "0:0 640" "after a takeover without CAP_CHOWN"
    dd if="$given" of=/dev/null bs=4096 count=1 iflag=direct status=none || fail "the device taken over does not answer"
    grep -q "the device is served as it is" "$log" || fail "nothing is said of an owner that cannot be set"
    quarry volume detach acme/given
}

udevd=
start_udevd() {
    local program
    for program in /usr/lib/systemd/systemd-udevd /lib/systemd/systemd-udevd; do
        [[ -x $program ]] && break
    done
    # The host's own rules for Quarry, if it has any, are none of the guest's.
    if [[ -d /etc/udev/rules.d ]]; then mount -t tmpfs tmpfs /etc/udev/rules.d; fi
    mkdir -p /run/udev/rules.d
    ln -s /dev/null /run/udev/rules.d/60-quarry.rules
    "$program" >"$dir/udevd.log" 2>&1 &
    udevd=$!
    for _ in $(seq 100); do
        sleep 0.1
        # It may answer once and end then.
        kill -0 "$udevd" 2>/dev/null || break
        udevadm control --ping 2>/dev/null || continue
        sleep 0.5
        kill -0 "$udevd" 2>/dev/null && return
    done
    echo "SKIP udevd does not run in this kernel: $(tail -n 1 "$dir/udevd.log")"
    exit 77
}
settle() {
    udevadm control --ping || fail "udevd is gone"
    for _ in $(seq 600); do
        [[ -e /run/udev/queue ]] || return 0
        sleep 0.05
    done
    fail "udevd does not come to an end"
}
trigger() {
    udevadm trigger --action="$1" --subsystem-match=block --sysname-match='ublkb*'
    settle
}

with_udev() {
    local given plain
    disk=$(getent group disk | cut -d: -f3)
    quarry volume attach acme/given --via ublk "${access[@]}"
    expect given "$wanted" "after attaching without the rule"
    settle
    expect given "$wanted" "after udev, without the rule"
    grep -q "udev does not have Quarry's rule" "$log" || fail "nothing is said of the rule that is missing"
    # That is what the rule is for; and udevd is not asleep.
    trigger add
    expect given "$(id -u $user):$disk 660" "after udev's next event without the rule"
    given=$(node given)
    quarry volume detach acme/given
    expect_gone given "$given"

    # What udev still knows of the device before must not be taken for this one's.
    quarry volume attach acme/given --via ublk "${access[@]}"
    udevadm control --stop-exec-queue
    quarry volume detach acme/given
    quarry volume attach acme/given --via ublk "${access[@]}" &
    local attaching=$!
    sleep 1
    kill -0 "$attaching" || fail "an attach did not wait for udev"
    udevadm control --start-exec-queue
    wait "$attaching" || fail "an attach that waited for udev"
    settle
    expect given "$wanted" "after an attach that waited for udev"
    quarry volume detach acme/given

    ln -sf "$(realpath "$rule")" /run/udev/rules.d/60-quarry.rules
    udevadm control --reload
    for round in $(seq 20); do
        quarry volume attach acme/given --via ublk "${access[@]}"
        expect given "$wanted" "after attaching with the rule, round $round"
        given=$(node given)
        if ((round % 2)); then settle; fi
        quarry volume detach acme/given
        expect_gone given "$given"
    done
    settle
    expect_gone given "$given"

    quarry volume attach acme/given --via ublk "${access[@]}"
    quarry volume attach acme/plain --via ublk
    given=$(node given) plain=$(node plain)
    look() { # WHEN
        expect given "$wanted" "$1"
        expect plain "0:$disk 660" "$1"
        [[ $(udevadm info --query=symlink "$given") == *quarry/acme/given* ]] || fail "the name is not udev's $1"
    }
    look "after attaching both"
    # All by itself.
    rm /dev/quarry/acme/given
    chown 0:0 "$given"
    for action in change add; do
        trigger $action
        look "after udevadm trigger --action=$action"
    done
    kill_daemon
    trigger change
    look "while the daemon is dead"
    start_daemon
    look "after a kill"
    trigger change
    look "after a kill and udev's next event"
    quarry volume detach acme/given
    quarry volume detach acme/plain
    settle
    expect_gone given "$given"
    expect_gone plain "$plain"
    ! grep 'ublkb\|quarry' "$dir/udevd.log" || fail "udevd complains"
    kill "$udevd"
}

if [[ $way == udev ]]; then start_udevd; fi
start_daemon
quarry tenant create acme
for name in given plain; do quarry volume create "acme/$name" --size 64MiB; done
case $way in
alone) without_udev ;;
udev) with_udev ;;
*) fail "no such way: $way" ;;
esac
stop_daemon
say "passed"
