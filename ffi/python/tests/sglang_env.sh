#!/usr/bin/env bash
# Makes a Python environment with SGLang's own classes and none of its gigabytes: the sglang wheel without its dependencies,
# the pure ones that its PD code imports, and real Mooncake (TCP) as the rival. Prints the environment's python.
#
#   sglang_env.sh [VERSION]     VERSION: an SGLang release, default 0.5.23
#
# The environment lies outside of the checkout and is used again by the next run: ${XDG_CACHE_HOME:-~/.cache}/kvtransfer-sglang-VERSION
set -euo pipefail
version="${1:-0.5.23}"
place="${XDG_CACHE_HOME:-$HOME/.cache}/kvtransfer-sglang-$version"
if [[ ! -e "$place/complete" ]]; then
    rm -rf "$place"
    python3 -m venv "$place" >&2
    pip=("$place/bin/python" -m pip --quiet --disable-pip-version-check install)
    # What `import sglang.srt.disaggregation` really uses of SGLang's long list.
    "${pip[@]}" numpy pyzmq requests aiohttp msgspec psutil orjson pybase64 pillow packaging fastapi starlette \
        prometheus-client typing_extensions pydantic dill mooncake-transfer-engine-non-cuda >&2
    # What our package and this suite need.
    "${pip[@]}" cffi pytest pytest-timeout >&2
    "${pip[@]}" --no-deps "sglang==$version" >&2
    touch "$place/complete"
fi
echo "$place/bin/python"
