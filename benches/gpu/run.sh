#!/bin/bash
# Proofs on a GPU, in two halves: the machine with the GPU needs neither a toolchain nor a network.
#
#   benches/gpu/run.sh pack FOLDER            here: builds all that is needed and puts it into FOLDER (some 40 MB)
#   bash FOLDER/run.sh there FOLDER RESULTS   there: every proof, its log in RESULTS, the table of goals last
#
# PROFILE=dev packs an unoptimised build. RIVALS=no packs no wheels of other engines; PYTHON is that machine's version of Python,
# default 3.12. LIMIT: seconds that all of it may take there, default 480; what has no time left is said so. Each step has
# a limit of its own, and one that fails or takes too long does not stop the others; the exit status says. Where there is
# no GPU it says why and ends with status 77.
set -uo pipefail

pack() {
    local folder=$1 profile=${PROFILE:-release} here program bench
    here=$(cd "$(dirname "$0")/../.." && pwd)
    cd "$here" || exit 1
    cargo build -p kvtransfer-benches --bins --profile "$profile" || exit 1
    # The newest: cargo keeps those of other settings beside it.
    bench=$(cargo bench -p kvtransfer-benches --bench gpu --no-run --profile "$profile" 2>&1 | sed -n 's/.*Executable.*(\(.*\))$/\1/p')
    [ -x "$bench" ] || exit 1
    [ "$profile" = dev ] && profile=debug
    mkdir -p "$folder"
    for program in kvgpu kvbench; do
        strip -o "$folder/$program" "${CARGO_TARGET_DIR:-target}/$profile/$program" || exit 1
    done
    strip -o "$folder/gpu-bench" "$bench" || exit 1
    cp benches/gpu/{run.sh,nvlink.sh,step.sh,show.py,theft.py,rivals.py} kvtransfer/src/gpu/kernels/copy.cu "$folder/" || exit 1
    [ "${RIVALS:-yes}" = no ] || rivals "$folder"
    du -ah "$folder"
}

# Of NIXL what moves memory by UCX, of Mooncake the engine: the wheels as they are have ten times as much.
rivals() {
    local folder=$1 site
    site=$(mktemp -d)
    python3 -m pip --quiet --disable-pip-version-check install --no-deps --only-binary=:all: --target "$site" --implementation cp \
        --python-version "${PYTHON:-3.12}" --platform manylinux_2_28_x86_64 --platform manylinux_2_34_x86_64 --platform manylinux_2_35_x86_64 \
        --platform manylinux_2_39_x86_64 nixl nixl-cu13 mooncake-transfer-engine-cuda13 || echo "without the wheels of other engines"
    (
        cd "$site" || exit 1
        # The modules that Python and UCX open, and all that those need; whatever else is a library goes.
        local new="nixl_cu13/*.so mooncake/engine.so .nixl_cu13.mesonpy.libs/plugins/libplugin_UCX.so nixl_cu13.libs/nixl/libplugin_UCX.so
            nixl_cu13.libs/ucx/libuc[tm]_*.so*" kept needed file
        # shellcheck disable=SC2086
        new=$(ls $new 2>/dev/null) kept=
        while [ -n "$new" ]; do
            kept+=$'\n'$new
            # shellcheck disable=SC2086
            needed=$(readelf -d $new | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | sort -u)
            new=$(for file in $needed; do find . -name "$file" -printf "%P\n"; done | grep -vxF "$kept")
        done
        find . -name "*.so*" -type f -printf "%P\n" | grep -vxF "$kept" | xargs -r -d "\n" rm
        rm -rf nixl_ep* bin
        tar -cJf - .
    ) >"$folder/rivals.tar.xz"
    rm -rf "$site"
}

there() {
    local folder out log until case kernel
    folder=$(cd "$1" && pwd) || exit 1
    # shellcheck source=benches/gpu/step.sh
    . "$folder/step.sh"
    gpus "$folder/kvgpu" 1 || exit 77
    mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 1
    log=$out/gpu.log until=$(($(date +%s) + ${LIMIT:-480}))
    export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$(mktemp -d)}
    local kvgpu=$folder/kvgpu bench="$folder/kvbench --json --rounds 3" many="$folder/kvbench --json --faults 0"
    {
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        uname -r
    } >"$log" 2>&1
    step 30 facts "$kvgpu" facts
    step 60 verify "$kvgpu" verify
    step 30 "verify, built-in PTX" "$kvgpu" verify --small --built-in
    # Engines, both processes on the one GPU: single transfers, then many at once.
    step 40 "pull" $bench --path shm --case pages-16k --case pages-4k --case pages-1m --gpu 0
    for case in short-16k pages-4k; do
        for kernel in bulk thin; do
            step 30 "many, pull, $case, $kernel" $many --path shm --case $case --gpu 0 --gpu-kernel $kernel
        done
        step 30 "many, pull, $case, no bound" $many --path shm --case $case --gpu 0 --gpu-percent 100
        step 30 "many, pull, $case, no bound, 4 lanes" $many --path shm --case $case --gpu 0 --gpu-percent 100 --lanes 4
    done
    step 30 "many, host tcp" $many --path tcp --lanes 4
    step 30 "many, tcp" $many --path tcp --lanes 4 --gpu 0
    step 30 "many, tcp, batches of 8 MiB" $many --path tcp --lanes 4 --gpu 0 --staged-kib 8192
    step 30 "many, host tcp, 8 lanes" $many --path tcp --lanes 8
    step 30 "many, tcp, 8 lanes" $many --path tcp --lanes 8 --gpu 0
    step 30 "many, host ring" $many --path ring --lanes 4
    step 30 "many, ring" $many --path ring --lanes 4 --gpu 0
    step 30 "many, host ring of 64 MiB" $many --path ring --lanes 4 --ring-mib 64
    step 30 "many, ring of 64 MiB" $many --path ring --lanes 4 --gpu 0 --ring-mib 64
    step 60 "faults and restarts, pull" "$folder/kvbench" --json --path shm --gpu 0 --faults 8 --restarts 1000
    step 60 "faults and restarts, tcp" "$folder/kvbench" --json --path tcp --gpu 0 --faults 8 --restarts 1000
    step 120 "faults and restarts, ring" "$folder/kvbench" --json --path ring --gpu 0 --faults 8 --restarts 1000
    step 30 "mapping refused" "$folder/kvbench" --json --rounds 1 --path ring --case pages-16k --gpu 0 --refuse-mapping
    unpack_rivals "$folder"
    PYTHONPATH=${PYTHONPATH:-} step 110 "rivals" python3 "$folder/rivals.py" --gpu 0 --kvbench "$folder/kvbench" --seconds 95 \
        --cases pages-16k,pages-4k
    step 60 "an event that is late" "$kvgpu" event
    step 60 "staging" "$kvgpu" staging
    step 60 "kernels" "$kvgpu" kernels
    step 60 "ipc" "$kvgpu" ipc --gib "${GIB:-8}"
    step 60 "a matmul beside copies" python3 -W ignore "$folder/theft.py" "$folder/copy.cu"
    step 70 "unequal ranks" "$kvgpu" heads --pages 128
    if command -v compute-sanitizer >/dev/null; then
        step 40 "memcheck" compute-sanitizer --tool memcheck --error-exitcode 9 "$kvgpu" verify --tiny
        step 40 "racecheck" compute-sanitizer --tool racecheck --error-exitcode 9 "$kvgpu" verify --tiny
    fi
    CRITERION_HOME=$(mktemp -d) step 90 "criterion" "$folder/gpu-bench" --bench --noplot --warm-up-time 0.3 --measurement-time 1
    # Of the many rows of `verify` only those that are wrong.
    awk '/^== verify/ {quiet = 1} /^-- / {quiet = 0} !quiet || /WRONG/' "$log" | grep -vE "^\{|, round [0-9]"
    echo "right: $(grep -cE " right( |$)" "$log"), wrong: $(grep -cE " WRONG( |$)" "$log")"
    grep -E "^-- .*(exit [1-9]|not run)" "$log"
    python3 "$folder/show.py" one "$log"
    return $failed
}

"${1:?pack or there}" "${@:2}"
