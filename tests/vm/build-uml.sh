#!/usr/bin/env bash
# Builds the kernel of the ublk tests: User Mode Linux, a program that is a Linux kernel and runs as any user,
# from Debian's own linux-source package. Takes 4 to 13 minutes on two cores, once.
#
# usage: tests/vm/build-uml.sh [DIRECTORY]      (default: $QUARRY_VM_CACHE, or target/vm)
# result: DIRECTORY/linux; nothing is done if it is there already and was built from the same configuration.
#
# Nothing of another Debian release is installed: its package lists go to a private directory, and the package is
# only downloaded and unpacked.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-${QUARRY_VM_CACHE:-${CARGO_TARGET_DIR:-$here/../../target}/vm}}
suite=${QUARRY_VM_SUITE:-trixie-backports}
# ublk with all that the daemon uses came with 6.16; the first of these that the suite has is taken.
versions=${QUARRY_VM_VERSIONS:-7.3 7.2 7.1 6.19 6.18 6.17}
config=$here/uml.config

mkdir -p "$out"
out=$(cd "$out" && pwd)
say() { echo "build-uml: $*" >&2; }

wanted=$(sha256sum "$config" | cut -d' ' -f1)
if [[ -x $out/linux && $(cat "$out/linux.config-sum" 2>/dev/null) == "$wanted" ]]; then
    say "$out/linux is there"
    exit 0
fi

missing=()
for program in gcc make flex bison bc xz; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if ((${#missing[@]})); then
    say "cannot build without ${missing[*]} (apt-get install gcc make flex bison bc xz-utils libc6-dev)"
    exit 1
fi

work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT

# A private set of package lists, from the mirror that this machine uses anyway.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' |
    grep -v security | sort -u | head -n 1)
apt=$work/apt
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$apt/sources.list"
private=(-qq
    -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
    -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache"
    -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Retries=3)
say "package lists of $suite from $mirror"
apt-get "${private[@]}" update
version=
for candidate in $versions; do
    if apt-cache "${private[@]}" show "linux-source-$candidate" >/dev/null 2>&1; then
        version=$candidate
        break
    fi
done
[[ -n $version ]] || { say "$suite has none of linux-source-{${versions// /,}}"; exit 1; }

say "downloading and unpacking linux-source-$version"
(cd "$work" && apt-get "${private[@]}" download "linux-source-$version")
source=$work/linux-source-$version
# What User Mode Linux never compiles is left out: unpacking is a good part of the work.
dpkg-deb --fsys-tarfile "$work"/linux-source-*.deb |
    tar --extract --to-stdout "./usr/src/linux-source-$version.tar.xz" |
    tar --extract --xz --directory "$work" \
        --exclude='*/drivers/gpu/drm/*.[ch]' --exclude='*/sound/*.[ch]' \
        --exclude='*/tools/testing/*' --exclude='*/Documentation/*.rst' --exclude='*/arch/arm*/*.dts*'
rm -f "$work"/linux-source-*.deb

say "configuring"
kernel=(make --silent --directory "$source" ARCH=um "O=$work/object")
mkdir "$work/object"
KCONFIG_ALLCONFIG=$config "${kernel[@]}" allnoconfig >"$out/build.log" 2>&1
for option in BLK_DEV_UBLK IO_URING INOTIFY_USER SMP DM_FLAKEY HOSTFS EXT4_FS BLK_DEV_UBD DEVTMPFS_MOUNT TMPFS; do
    grep -qx "CONFIG_$option=y" "$work/object/.config" || { say "this kernel has no $option"; exit 1; }
done

say "compiling (log: $out/build.log)"
nice -n 10 "${kernel[@]}" -j"${QUARRY_VM_JOBS:-$(nproc)}" linux >>"$out/build.log" 2>&1 || {
    tail -n 30 "$out/build.log" >&2
    exit 1
}
strip --strip-debug -o "$work/linux" "$work/object/vmlinux"
chmod +x "$work/linux"
mv "$work/linux" "$out/linux"
echo "$wanted" >"$out/linux.config-sum"
say "built $out/linux from linux-source-$version in $SECONDS s"
