#!/usr/bin/env bash
# Gets QEMU, and makes the disk image of a small machine for it: GRUB in front of one ext4, which has Debian's cloud kernel and
# busybox. Its init does what it is told by its serial port (below). 47 MB of packages are downloaded, unpacked here, and installed
# nowhere: a QEMU that the system has may be of another release, and another kernel is none of its business.
#
# usage: tests/vm/build-qemu.sh [DIRECTORY]      (default: $QUARRY_QEMU_CACHE, or target/qemu)
# result: DIRECTORY/qemu-system-x86_64 and DIRECTORY/boot.img; nothing is done if this script, as it is, made them already.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-${QUARRY_QEMU_CACHE:-${CARGO_TARGET_DIR:-$here/../../target}/qemu}}
# Bytes of the image, and where its one partition begins.
size=$((64 << 20)) first=$((1 << 20))

mkdir -p "$out"
out=$(cd "$out" && pwd)
say() { echo "build-qemu: $*" >&2; }

wanted=$(sha256sum "${BASH_SOURCE[0]}" | cut -d' ' -f1)
if [[ -f $out/boot.img && $(cat "$out/made-by" 2>/dev/null) == "$wanted" ]]; then
    say "$out/boot.img is there"
    exit 0
fi
for program in apt-get dpkg-deb busybox mkfs.ext4 xz; do
    command -v "$program" >/dev/null || { say "cannot build without $program (Debian's packages apt, dpkg, busybox, e2fsprogs, xz-utils)"; exit 1; }
done

work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
at=$out/programs
rm -rf "$out/made-by" "$at"
mkdir "$work/packages" "$at"

# What this machine lacks of the packages; what it has is used as it is. Only asked: nothing is installed.
lacking() { apt-get --simulate install --no-install-recommends "$@" 2>/dev/null | sed -n 's/^Inst \([^ ]*\).*/\1/p'; }
if ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 && [[ $(id -u) == 0 ]]; then apt-get update -qq; fi
kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
[[ -n $kernel ]] || { say "apt knows no linux-image-cloud-amd64"; exit 1; }
mapfile -t packages < <(lacking qemu-system-x86 seabios qemu-system-data; lacking grub-pc-bin)
say "downloading ${packages[*]} $kernel"
(cd "$work/packages" && apt-get download -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 "${packages[@]}" "$kernel")
for package in "$work"/packages/linux-image-*.deb; do dpkg-deb --extract "$package" "$work/kernel"; rm "$package"; done
for package in "$work"/packages/*.deb; do dpkg-deb --extract "$package" "$at"; done

# From here, if it is here.
place() { if [[ -e $at/$1 ]]; then echo "$at/$1"; else echo "/$1"; fi; }
libraries=$at/usr/lib/x86_64-linux-gnu
cat >"$out/qemu-system-x86_64" <<RUN
#!/bin/sh
export LD_LIBRARY_PATH="$libraries" QEMU_MODULE_DIR="$(place usr/lib/x86_64-linux-gnu/qemu)"
exec "$(place usr/bin/qemu-system-x86_64)" -L "$(place usr/share/qemu)" -L "$(place usr/share/seabios)" "\$@"
RUN
chmod +x "$out/qemu-system-x86_64"
"$out/qemu-system-x86_64" --version >&2

# busybox, with its libraries if it has any.
with_busybox() {
    local root=$1 program library
    program=$(command -v busybox)
    mkdir -p "$root/bin"
    cp "$program" "$root/bin/busybox"
    for library in $(ldd "$program" 2>/dev/null | grep -o '/[^ ]*'); do
        mkdir -p "$root/$(dirname "$library")"
        cp --dereference "$library" "$root/$library"
    done
    ln -s busybox "$root/bin/sh"
}

# The first root: the drivers of the disk that the kernel has as modules, in the order in which they are loaded.
modules=(virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk)
initrd=$work/initrd
with_busybox "$initrd"
mkdir "$initrd/dev" "$initrd/root"
for module in "${modules[@]}"; do
    file=$(find "$work/kernel" -name "$module.ko*" | head -n 1)
    case $file in
    '') continue ;; # in the kernel
    *.xz) xz -dc "$file" >"$initrd/$module.ko" ;;
    *) cp "$file" "$initrd/$module.ko" ;;
    esac
done
cat >"$initrd/init" <<INIT
#!/bin/sh
busybox mount -t devtmpfs devtmpfs /dev
for module in ${modules[*]}; do [ ! -e /\$module.ko ] || busybox insmod /\$module.ko; done
busybox mount -t ext4 /dev/vda1 /root || busybox poweroff -f
busybox mount -t devtmpfs devtmpfs /root/dev
exec busybox switch_root /root /sbin/init
INIT
chmod +x "$initrd/init"

# The disk's root. Each line that comes by the serial port is a command of the shell; when it is done, its status is told.
root=$work/root
with_busybox "$root"
mkdir -p "$root"/{boot/grub,dev,proc,sys,run,sbin,data}
cat >"$root/sbin/init" <<'INIT'
#!/bin/sh
exec </dev/ttyS0 >/dev/ttyS0 2>&1
busybox stty -F /dev/ttyS0 -echo
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t tmpfs tmpfs /run
echo "guest: up, with $(busybox grep ' / ' /proc/mounts)"
while read -r line; do
    eval "$line"
    echo "guest: status $?"
done
busybox poweroff -f
INIT
chmod +x "$root/sbin/init"
cp "$work"/kernel/boot/vmlinuz-* "$root/boot/vmlinuz"
(cd "$initrd" && find . | busybox cpio -o -H newc 2>/dev/null) | gzip -1 >"$root/boot/initrd"
cat >"$root/boot/grub/grub.cfg" <<'CONFIG'
linux /boot/vmlinuz console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable random.trust_cpu=on rcupdate.rcu_expedited=1 cryptomgr.notests apparmor=0 audit=0 8250.nr_uarts=1
initrd /boot/initrd
boot
CONFIG

# GRUB's first sector loads the rest from the sectors behind it, where its image says by itself how long it is.
grub=$(place usr/lib/grub/i386-pc)
"$(place usr/bin/grub-mkimage)" --format=i386-pc --directory="$grub" --prefix='(hd0,msdos1)/boot/grub' --output="$work/core.img" \
    biosdisk part_msdos ext2 linux normal
(($(stat -c %s "$work/core.img") < first - 512)) || { say "GRUB is too long"; exit 1; }
image=$work/boot.img
truncate -s "$size" "$image"
# Its one entry of the partition table: active, Linux, from `first` to the end, in sectors and little-endian.
word() { printf '\\x%02x' $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24 & 255)); }
printf "\x80\0\0\0\x83\0\0\0$(word $((first / 512)))$(word $(((size - first) / 512)))" |
    dd of="$image" bs=1 seek=446 conv=notrunc status=none
printf '\x55\xaa' | dd of="$image" bs=1 seek=510 conv=notrunc status=none
# Without what GRUB cannot read.
mkfs.ext4 -q -F -O ^metadata_csum_seed,^orphan_file -d "$root" -E "offset=$first" "$image" "$(((size - first) / 1024))k"
dd if="$grub/boot.img" of="$image" bs=440 count=1 conv=notrunc status=none
dd if="$work/core.img" of="$image" bs=512 seek=1 conv=notrunc status=none
mv "$image" "$out/boot.img"
echo "$wanted" >"$out/made-by"
say "made $out/boot.img in $SECONDS s"
