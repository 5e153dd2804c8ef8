#!/usr/bin/env bash
# The whole suite with one command: builds the library, makes the environment, runs every test over SGLang's real classes.
#
#   run.sh [VERSION] [pytest arguments]     VERSION: an SGLang release, default 0.5.23
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
version="0.5.23"
if [[ "${1:-}" =~ ^[0-9] ]]; then
    version="$1"
    shift
fi
python="$("$here/sglang_env.sh" "$version")"
if [[ -z "${KVTRANSFER_LIBRARY:-}" ]]; then
    (cd "$here/../../.." && cargo build --quiet -p kvtransfer-ffi)
    KVTRANSFER_LIBRARY="${CARGO_TARGET_DIR:-$here/../../../target}/debug/libkvtransfer.so"
fi
export KVTRANSFER_LIBRARY
exec "$python" -m pytest -q -p no:cacheprovider "$here" "$@"
