#!/usr/bin/env bash
# Runs the tests that need a real Envoy; arguments go to the test binary.
set -euo pipefail
cd "$(dirname "$0")/../../.."
KVROUTER_ENVOY="${KVROUTER_ENVOY:-$(router/tests/envoy/fetch.sh)}"
export KVROUTER_ENVOY
# CI has built the whole workspace before, which shares features among its members.
scope=(-p kvrouter)
[[ -z "${CI:-}" ]] || scope=(--workspace)
if [[ -z "${KVROUTER_EXAMPLE_WORKER:-}" ]]; then
  [[ -n "${CI:-}" ]] || cargo build --quiet -p kvtransfer-examples --bin kvworker
  target=$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
  KVROUTER_EXAMPLE_WORKER="$target/debug/kvworker"
fi
export KVROUTER_EXAMPLE_WORKER
cargo test "${scope[@]}" --test envoy -- --include-ignored "$@"
