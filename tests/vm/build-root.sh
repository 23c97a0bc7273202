#!/usr/bin/env bash
# Makes the disk image of a clean Debian 12 with systemd, for boot-root: nothing but what its packages bring, and a service
# that mounts the host's / and runs what boot-root says. Half a minute to a minute, once. Needs root, and mmdebstrap.
#
# usage: tests/vm/build-root.sh [DIRECTORY]      (default: $QUARRY_ROOT_CACHE, or target/root)
# result: DIRECTORY/root.ext4; nothing is done if it is there already and was made by this script as it is.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-${QUARRY_ROOT_CACHE:-${CARGO_TARGET_DIR:-$here/../../target}/root}}
packages=systemd,systemd-sysv,udev,kmod,e2fsprogs
size=3G

mkdir -p "$out"
out=$(cd "$out" && pwd)
say() { echo "build-root: $*" >&2; }

wanted=$(sha256sum "${BASH_SOURCE[0]}" | cut -d' ' -f1)
if [[ -f $out/root.ext4 && $(cat "$out/root.sum" 2>/dev/null) == "$wanted" ]]; then
    say "$out/root.ext4 is there"
    exit 0
fi
for program in mmdebstrap mkfs.ext4; do
    command -v "$program" >/dev/null || { say "cannot build without $program (apt-get install mmdebstrap e2fsprogs)"; exit 1; }
done
[[ $(id -u) == 0 ]] || { say "only root can make it"; exit 1; }

work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
# The mirror that this machine uses anyway.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' |
    grep -v security | sort -u | head -n 1)
say "a Debian 12 from $mirror"
mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" bookworm "$work/root" \
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main"

root=$work/root
echo quarry-test >"$root/etc/hostname"
echo '/dev/ubda / ext4 defaults 0 1' >"$root/etc/fstab"
# Nobody logs in.
rm -f "$root/etc/systemd/system/getty.target.wants/"*
ln -sf /dev/null "$root/etc/systemd/system/getty@.service"
for unit in console-getty getty-static; do ln -sf /dev/null "$root/etc/systemd/system/$unit.service"; done
cat >"$root/usr/local/sbin/run-test" <<'RUN'
#!/bin/bash
# Runs what boot-root says, and powers off.
[[ $(cat /proc/cmdline) =~ quarry\.test=([^ ]+) ]] || exit 0
mkdir -p /host
mount -t hostfs none /host || exit 1
at=/host${BASH_REMATCH[1]}
systemctl is-system-running --wait >/dev/null 2>&1
bash "$at/command" >>"$at/log" 2>&1 </dev/null
status=$?
journalctl --boot --no-pager >>"$at/journal" 2>&1
echo "$status" >"$at/status"
sync
systemctl --no-block poweroff
RUN
chmod +x "$root/usr/local/sbin/run-test"
cat >"$root/etc/systemd/system/run-test.service" <<'UNIT'
[Unit]
Description=What boot-root says
[Service]
Type=simple
ExecStart=/usr/local/sbin/run-test
# It mounts the host's / where units see it.
PrivateMounts=no
[Install]
WantedBy=multi-user.target
UNIT
ln -s ../run-test.service "$root/etc/systemd/system/multi-user.target.wants/run-test.service"
mkfs.ext4 -q -d "$root" "$work/root.ext4" "$size"
mv "$work/root.ext4" "$out/root.ext4"
echo "$wanted" >"$out/root.sum"
say "made $out/root.ext4 in $SECONDS s"
