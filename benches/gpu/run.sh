#!/bin/bash
# Proofs on a GPU, in two halves: the machine with the GPU needs neither a toolchain nor a network.
#
#   benches/gpu/run.sh pack FOLDER            here: builds kvgpu and puts all that is needed into FOLDER
#   bash FOLDER/run.sh there FOLDER RESULTS   there: every proof, its log in RESULTS, a table last
#
# PROFILE=dev packs an unoptimised build. A step that fails or takes too long does not stop the others; the exit status says.
set -uo pipefail

pack() {
    local folder=$1 profile=${PROFILE:-release} here
    here=$(cd "$(dirname "$0")/../.." && pwd)
    cd "$here" || exit 1
    cargo build -p kvtransfer-benches --bin kvgpu --profile "$profile" || exit 1
    [ "$profile" = dev ] && profile=debug
    mkdir -p "$folder"
    cp "${CARGO_TARGET_DIR:-target}/$profile/kvgpu" "$folder/kvgpu"
    strip "$folder/kvgpu"
    cp benches/gpu/run.sh benches/gpu/theft.py kvtransfer/src/gpu/kernels/copy.cu "$folder/"
    ls -l "$folder"
}

there() {
    local folder=$1 out=$2 failed=0
    mkdir -p "$out"
    local kvgpu=$folder/kvgpu log=$out/gpu.log
    export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$out/../kvgpu-cache}
    step() { # seconds, name, command…
        local limit=$1 name=$2 start
        shift 2
        start=$(date +%s)
        echo "== $name" >>"$log"
        timeout "$limit" "$@" >>"$log" 2>&1
        local code=$?
        echo "-- $name: exit $code after $(($(date +%s) - start)) s" >>"$log"
        [ $code = 0 ] || failed=1
    }
    {
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        uname -r
    } >"$log" 2>&1
    step 60 facts "$kvgpu" facts
    step 90 verify "$kvgpu" verify
    step 60 "verify, built-in PTX" "$kvgpu" verify --small --built-in
    step 90 kernels "$kvgpu" kernels
    step 180 ipc "$kvgpu" ipc
    step 90 "a matmul beside copies" python3 -W ignore "$folder/theft.py" "$folder/copy.cu"
    if command -v compute-sanitizer >/dev/null; then
        step 60 "memcheck" compute-sanitizer --tool memcheck --error-exitcode 9 "$kvgpu" verify --tiny
        step 60 "racecheck" compute-sanitizer --tool racecheck --error-exitcode 9 "$kvgpu" verify --tiny
    fi
    # Of the many rows of `verify` only those that are wrong.
    awk '/^== verify/ {quiet = 1} /^-- / {quiet = 0} !quiet || /WRONG/' "$log"
    echo "right: $(grep -cE " right( |$)" "$log"), wrong: $(grep -cE " WRONG( |$)" "$log")"
    grep -E "^-- " "$log"
    return $failed
}

"${1:?pack or there}" "${@:2}"
