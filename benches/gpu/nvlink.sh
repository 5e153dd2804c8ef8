#!/bin/bash
# Proofs between two GPUs of one host, over what `run.sh pack FOLDER` has made:
#
#   bash FOLDER/nvlink.sh there FOLDER RESULTS   every proof, its log in RESULTS, one table last
#
# A step that fails or takes too long does not stop the others; the exit status says.
set -uo pipefail

there() {
    local folder=$1 out=$2 failed=0
    mkdir -p "$out"
    local log=$out/nvlink.log bench="$folder/kvbench --json --rounds 2"
    local many="$folder/kvbench --json" two="--gpu 0 --peer-gpu 1"
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
        nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv,noheader
        nvidia-smi topo -m
        nvidia-smi nvlink --status -i 0
        uname -r
    } >"$log" 2>&1
    step 60 "copies out of the other GPU" "$folder/kvgpu" ipc --peer-gpu 1 --gib "${GIB:-8}"
    step 50 "pull" $bench --path shm --case pages-16k --case pages-4k --case one-1gib $two
    local case kernel
    for case in short-16k pages-4k; do
        for kernel in bulk thin; do
            step 20 "many, pull, $case, $kernel" $many --faults 0 --path shm --case $case $two --gpu-kernel $kernel
        done
        step 20 "many, pull, $case, no bound" $many --faults 0 --path shm --case $case $two --gpu-percent 100
    done
    step 20 "many, host tcp" $many --faults 0 --path tcp --lanes 4
    step 20 "many, host ring" $many --faults 0 --path ring --lanes 4
    step 30 "faults, pull" $many --path shm $two --faults 4 --restarts 50
    step 30 "faults, tcp" $many --path tcp --lanes 4 $two --faults 4 --restarts 20
    step 30 "faults, ring" $many --path ring --lanes 4 $two --faults 4 --restarts 20
    step 60 "unequal ranks" "$folder/kvgpu" heads --pages 256 --peer-gpu 1
    grep -vE "^\{|, round [0-9]" "$log"
    echo "right: $(grep -cE " right( |$)" "$log"), wrong: $(grep -cE " WRONG( |$)" "$log")"
    python3 "$folder/show.py" "$log"
    return $failed
}

"${1:?there}" "${@:2}"
