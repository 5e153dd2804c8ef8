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
    cargo build -p kvtransfer-benches --bins --profile "$profile" || exit 1
    [ "$profile" = dev ] && profile=debug
    mkdir -p "$folder"
    for program in kvgpu kvbench; do
        cp "${CARGO_TARGET_DIR:-target}/$profile/$program" "$folder/$program"
        strip "$folder/$program"
    done
    cp benches/gpu/{run.sh,nvlink.sh,show.py,theft.py} kvtransfer/src/gpu/kernels/copy.cu "$folder/"
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
        # UNTIL: seconds since 1970, after which nothing begins.
        if [ "$start" -ge "${UNTIL:-$((start + 1))}" ]; then
            echo "-- $name: not run, no time is left" >>"$log"
            failed=1
            return
        fi
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
    step 90 ipc "$kvgpu" ipc --gib "${GIB:-8}"
    step 75 "a matmul beside copies" python3 -W ignore "$folder/theft.py" "$folder/copy.cu"
    if command -v compute-sanitizer >/dev/null; then
        step 60 "memcheck" compute-sanitizer --tool memcheck --error-exitcode 9 "$kvgpu" verify --tiny
        step 60 "racecheck" compute-sanitizer --tool racecheck --error-exitcode 9 "$kvgpu" verify --tiny
    fi
    # Engines, both processes on one GPU: single transfers, then many at once.
    local bench="$folder/kvbench --json --rounds 2" many="$folder/kvbench --json --faults 0"
    step 40 "pull" $bench --path shm --case pages-16k --case pages-4k --gpu 0
    step 30 "host tcp" $bench --path tcp --lanes 4 --case pages-16k
    step 30 "tcp" $bench --path tcp --lanes 4 --case pages-16k --gpu 0
    local case kernel
    for case in short-16k pages-4k; do
        for kernel in bulk thin; do
            step 20 "many, pull, $case, $kernel" $many --path shm --case $case --gpu 0 --gpu-kernel $kernel
        done
        step 20 "many, pull, $case, no bound" $many --path shm --case $case --gpu 0 --gpu-percent 100
    done
    step 20 "many, host tcp" $many --path tcp --lanes 4
    step 20 "many, tcp" $many --path tcp --lanes 4 --gpu 0
    step 20 "many, tcp, batches of 16 MiB" $many --path tcp --lanes 4 --gpu 0 --staged-kib 16384
    step 20 "many, host ring" $many --path ring --lanes 4
    step 20 "many, ring" $many --path ring --lanes 4 --gpu 0
    step 20 "many, ring of 64 MiB" $many --path ring --lanes 4 --gpu 0 --ring-mib 64
    step 60 "faults and restarts, pull" "$folder/kvbench" --json --path shm --gpu 0 --faults 8 --restarts 1000
    step 50 "faults and restarts, tcp" "$folder/kvbench" --json --path tcp --gpu 0 --faults 4 --restarts 200
    step 50 "faults and restarts, ring" "$folder/kvbench" --json --path ring --gpu 0 --faults 4 --restarts 200
    step 60 "unequal ranks" "$kvgpu" heads --pages 256
    # Of the many rows of `verify` only those that are wrong.
    awk '/^== verify/ {quiet = 1} /^-- / {quiet = 0} !quiet || /WRONG/' "$log" | grep -vE "^\{|, round [0-9]"
    echo "right: $(grep -cE " right( |$)" "$log"), wrong: $(grep -cE " WRONG( |$)" "$log")"
    python3 "$folder/show.py" "$log"
    grep -E "^-- " "$log"
    return $failed
}

"${1:?pack or there}" "${@:2}"
