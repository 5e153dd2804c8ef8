#!/bin/bash
# torch_pd on a machine with GPUs that has torch and no network: what it needs is packed here and run there.
#
#   examples/torch_pd/gpu.sh pack FOLDER [PYTHON]          here; PYTHON: that machine's version, default 3.12
#   bash FOLDER/gpu.sh there FOLDER RESULTS [FLAGS…]       there; FLAGS of torch_pd, as `--decode-gpu 1`
#
# LIBRARY names a libkvtransfer.so that is built already. LIMIT: seconds that the run there may take, default 420.
set -uo pipefail

pack() {
    local folder=$1 version=${2:-3.12} here library
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    mkdir -p "$folder/site" || exit 1
    library=${LIBRARY:-}
    if [ -z "$library" ]; then
        (cd "$here" && cargo build --release -p kvtransfer-ffi) || exit 1
        library=${CARGO_TARGET_DIR:-$here/target}/release/libkvtransfer.so
    fi
    strip -o "$folder/libkvtransfer.so" "$library" || exit 1
    rm -rf "$folder/site/kvtransfer" "$folder/site/torch_pd"
    # -L: the header in the package is a link where the package is not installed.
    cp -rL "$here/ffi/python/kvtransfer" "$here/examples/torch_pd" "$folder/site/" || exit 1
    find "$folder/site" -name __pycache__ -prune -exec rm -rf {} +
    # In a folder of its own, used only where the machine has none.
    python3 -m pip --quiet --disable-pip-version-check install --upgrade --no-deps --only-binary=:all: --target "$folder/cffi" \
        --python-version "$version" --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 cffi pycparser || exit 1
    cp "${BASH_SOURCE[0]}" "$folder/gpu.sh"
    du -sh "$folder"
}

there() {
    local folder results python=${PYTHON:-python3} limit=${LIMIT:-420} code
    folder=$(cd "$1" && pwd) || exit 1
    mkdir -p "$2" && results=$(cd "$2" && pwd) || exit 1
    shift 2
    export KVTRANSFER_LIBRARY=$folder/libkvtransfer.so PYTHONPATH=$folder/site${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
    "$python" -c "import cffi" 2>/dev/null || export PYTHONPATH=$PYTHONPATH:$folder/cffi
    {
        command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv,noheader
        uname -r
        timeout 90 "$python" - <<'P'
import importlib.metadata, sys
for name in ("torch", "transformers", "numpy", "cffi"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not there")
import kvtransfer
print("kvtransfer", kvtransfer.__version__, "on Python", sys.version.split()[0])
P
    } 2>&1 | tee "$results/torch_pd.log"
    timeout -k 20 "$limit" "$python" -m torch_pd --path auto,shm,tcp --json "$results/torch_pd.json" "$@" 2>&1 | tee -a "$results/torch_pd.log"
    code=${PIPESTATUS[0]}
    if [ "$code" = 2 ]; then
        # It could not be made at all: a short run with nothing but torch tells a fault of transformers from one of ours.
        echo "== again, short, without transformers" | tee -a "$results/torch_pd.log"
        timeout -k 20 120 "$python" -m torch_pd --model plain --size small --longest 4096 --prompts 6 "$@" 2>&1 | tee -a "$results/torch_pd.log"
        echo "the short run's exit code: ${PIPESTATUS[0]}" | tee -a "$results/torch_pd.log"
    fi
    echo "exit code $code" | tee -a "$results/torch_pd.log"
    return "$code"
}

"${1:?pack or there}" "${@:2}"
