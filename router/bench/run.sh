#!/usr/bin/env bash
# Measures kvrouter beside sglang-router and smg on this machine: JSON on stdout, a table on stderr. See README.md here.
# Options go to kvroutebench (`--help` lists them); PROFILE=release builds faster than what is shipped.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
profile="${PROFILE:-dist}"
target="${CARGO_TARGET_DIR:-$root/target}"
rivals="${XDG_CACHE_HOME:-$HOME/.cache}/kvrouter-rivals"

# Prints the Python of an environment that holds this package, made once.
rival() {
  local home="$rivals/$1-$2"
  if [[ ! -e "$home/complete" ]]; then
    rm -rf "$home"
    python3 -m venv "$home" >&2
    "$home/bin/pip" install --quiet --disable-pip-version-check "$1==$2" >&2
    touch "$home/complete"
  fi
  echo "$home/bin/python"
}

sglang_router=$(rival sglang-router 0.3.2)
smg=$(rival smg 1.13.0)
cargo build --manifest-path "$root/Cargo.toml" --profile "$profile" \
  -p kvrouter --bin kvrouter -p kvtransfer-benches --bin kvroutebench
# The scheduler alone; its own report goes to stderr, and its figures into ours.
cargo bench --manifest-path "$root/Cargo.toml" --profile "$profile" -p kvrouter --bench decision -- \
  --noplot 'fused|samples' >&2
logs=$(mktemp -d)
"$target/$profile/kvroutebench" --kvrouter "$target/$profile/kvrouter" \
  --sglang-router "$sglang_router" --smg "$smg" --criterion "$target/criterion" --logs "$logs" "$@" || {
  status=$?
  tail -n 20 "$logs"/*.log >&2
  echo "the routers' logs are in $logs" >&2
  exit "$status"
}
rm -rf "$logs"
