#!/bin/bash
# Proofs between two GPUs of one host, over what `run.sh pack FOLDER` has made:
#
#   bash FOLDER/nvlink.sh there FOLDER RESULTS   every proof, its log in RESULTS, the table of goals last
#
# LIMIT: seconds that all of it may take, default 420. Each step has a limit of its own, and one that fails or takes too long
# does not stop the others; the exit status says. With fewer than two GPUs it says so and ends with status 77.
set -uo pipefail

there() {
    local folder out log until case kernel
    folder=$(cd "$1" && pwd) || exit 1
    # shellcheck source=benches/gpu/step.sh
    . "$folder/step.sh"
    gpus "$folder/kvgpu" 2 || exit 77
    mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 1
    log=$out/nvlink.log until=$(($(date +%s) + ${LIMIT:-420}))
    export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$(mktemp -d)}
    local two="--gpu 0 --peer-gpu 1" many="$folder/kvbench --json --faults 0" bench="$folder/kvbench --json --rounds 3"
    {
        nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv,noheader
        nvidia-smi topo -m
        nvidia-smi nvlink --status -i 0
        uname -r
    } >"$log" 2>&1
    step 90 "ipc" "$folder/kvgpu" ipc --peer-gpu 1 --gib "${GIB:-8}"
    step 60 "pull" $bench --path shm --case pages-16k --case pages-4k --case pages-1m --case one-1gib $two
    step 60 "pull, no bound" $bench --path shm --case pages-16k --case pages-4k $two --gpu-percent 100
    for case in short-16k pages-4k; do
        for kernel in bulk thin; do
            step 30 "many, pull, $case, $kernel" $many --path shm --case $case $two --gpu-kernel $kernel
        done
        step 30 "many, pull, $case, no bound" $many --path shm --case $case $two --gpu-percent 100
    done
    step 30 "many, host tcp" $many --path tcp --lanes 4
    step 30 "many, host ring" $many --path ring --lanes 4
    step 60 "faults and restarts, pull" "$folder/kvbench" --json --path shm $two --faults 8 --restarts 200
    step 60 "faults and restarts, tcp" "$folder/kvbench" --json --path tcp --lanes 4 $two --faults 8 --restarts 100
    step 60 "faults and restarts, ring" "$folder/kvbench" --json --path ring --lanes 4 $two --faults 8 --restarts 100
    step 30 "many, ring of 64 MiB" $many --path ring --lanes 4 $two --ring-mib 64
    step 30 "mapping refused" "$folder/kvbench" --json --rounds 1 --path ring --case pages-16k $two --refuse-mapping
    step 60 "an event that is late" "$folder/kvgpu" event --peer-gpu 1
    step 80 "unequal ranks" "$folder/kvgpu" heads --pages 128 --peer-gpu 1
    unpack_rivals "$folder"
    PYTHONPATH=${PYTHONPATH:-} step 120 "rivals" python3 "$folder/rivals.py" --gpu 0 --peer-gpu 1 --kvbench "$folder/kvbench" --seconds 100 \
        --engines kvtransfer,kvtransfer-no-bound,nixl
    grep -vE "^\{|, round [0-9]" "$log"
    echo "right: $(grep -cE " right( |$)" "$log"), wrong: $(grep -cE " WRONG( |$)" "$log")"
    grep -E "^-- .*(exit [1-9]|not run)" "$log"
    python3 "$folder/show.py" two "$log"
    return $failed
}

"${1:?there}" "${@:2}"
