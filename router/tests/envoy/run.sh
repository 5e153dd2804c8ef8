#!/usr/bin/env bash
# Runs the tests that need a real Envoy; arguments go to the test binary.
set -euo pipefail
cd "$(dirname "$0")/../../.."
KVROUTER_ENVOY="${KVROUTER_ENVOY:-$(router/tests/envoy/fetch.sh)}"
export KVROUTER_ENVOY
# CI has built the whole workspace before, which shares features among its members.
scope=(-p kvrouter)
[[ -z "${CI:-}" ]] || scope=(--workspace)
cargo test "${scope[@]}" --test envoy -- --include-ignored "$@"
