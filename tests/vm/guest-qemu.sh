#!/usr/bin/env bash
# In the guest: a machine in QEMU boots from a volume's block device, writes while the daemon is killed and comes back, and while it is
# replaced; then it switches itself off, and its file system is looked at.
# usage: guest-qemu.sh DIRECTORY QEMU IMAGE OPTION...      (its options for the disk, which is /dev/quarry/acme/vm1 in them)
dir=$1 qemu=$2 image=$3
options=("${@:4}")
state=/mnt/state cache=/mnt/cache cache_size=192MiB
# shellcheck source=guest.sh
source "$(dirname "$0")/guest.sh"
export XDG_STATE_HOME=/mnt
volume=acme/vm1
console=/mnt/console

start_daemon
quarry tenant create acme
quarry volume import "$image" acme/debian >&2
quarry snapshot create acme/debian@golden
quarry volume clone acme/debian@golden "$volume"
quarry volume attach "$volume" --via ublk --mode 0660
disk=$(await_device)

mkfifo /mnt/keys
"$qemu" "${options[@]//\/dev\/quarry\/acme\/vm1/$disk}" -accel tcg,thread=single -cpu max -smp 1 -nodefaults -display none -no-reboot \
    -serial stdio </mnt/keys >"$console" 2>&1 &
machine=$!
exec {keys}>/mnt/keys
commands=0

# Waits for a line of the machine's that begins so, the Nth one.
await() {
    local begun=$SECONDS
    until (($(grep -a -c "^$1" "$console") >= $2)); do
        kill -0 "$machine" 2>/dev/null || { cat "$console" >&2; fail "QEMU ended"; }
        ((SECONDS - begun < 200)) || { cat "$console" >&2; fail "no '$1' number $2"; }
        sleep 0.1
    done
}

# Has the machine's shell carry out a command.
tell() { echo "$1" >&"$keys"; }
done_well() {
    ((++commands))
    await "guest: status" "$commands"
    [[ $(tr -d '\r' <"$console" | grep -a '^guest: status' | tail -n 1) == "guest: status 0" ]] || { cat "$console" >&2; fail "$1"; }
}
still_writes() {
    (($(grep -a -c "^guest: status" "$console") == commands)) || fail "it had written all before"
}

await "guest: up, with /dev/vda1 / ext4 rw" 1
say "a machine is up on $disk after $SECONDS s"
tell 'i=0; while [ $i -lt 50 ]; do echo $i >/data/f$i && busybox sync || break; i=$((i+1)); done'
sleep 0.3
still_writes
kill_daemon
sleep 0.5
start_daemon
done_well "writes over a kill"
tell 'i=50; while [ $i -lt 100 ]; do echo $i >/data/f$i && busybox sync || break; i=$((i+1)); done'
sleep 0.3
still_writes
replace_daemon
done_well "writes over a replacement"
tell 'busybox rm /data/f0 && busybox sync && busybox fstrim /'
done_well "fstrim"
tell 'busybox poweroff -f'
wait "$machine" || fail "QEMU did not end well"
say "the machine is off after $SECONDS s"

quarry volume detach "$volume"
kill_daemon
rm -rf "$cache" "$state"
start_daemon
quarry volume export "$volume" /mnt/disk >&2
dd if=/mnt/disk of=/mnt/partition bs=1M skip=1 status=none
check_clean /mnt/partition
for i in $(seq 99); do
    [[ $(debugfs -R "cat /data/f$i" /mnt/partition 2>/dev/null) == "$i" ]] || fail "file $i is lost"
done
stop_daemon
say "passed"
