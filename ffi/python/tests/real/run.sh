#!/usr/bin/env bash
# SGLang's real servers on this machine's CPU over this backend, with one command; see run.py.
#
#   run.sh [VERSION] [arguments of run.py]     VERSION: an SGLang release, default 0.5.17
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../../../.." && pwd)"
version="0.5.17"
if [[ "${1:-}" =~ ^[0-9] ]]; then
    version="$1"
    shift
fi
python="$("$here/make_env.sh" "$version")"
target="${CARGO_TARGET_DIR:-$root/target}"
scratch="$(mktemp -d)"
"$python" -m pip --quiet --disable-pip-version-check install maturin
(cd "$root" && cargo build --quiet -p kvrouter)
# The wheel, as a user installs it; the debug profile, because it is built already where the tests ran.
(cd "$here/../.." && "$(dirname "$python")/maturin" build --quiet --profile dev --out "$scratch")
"$python" -m pip --quiet --disable-pip-version-check install --force-reinstall --no-deps "$scratch"/kvtransfer-*.whl
exec "$python" "$here/run.py" --router "$target/debug/kvrouter" --out "$scratch" "$@"
