# What run.sh and nvlink.sh have in common: steps with a limit each and one for all, and the word on why there is nothing to run.
# The caller sets `log` and `until`, seconds since 1970 after which nothing goes on.

failed=0

# step SECONDS NAME COMMAND…: runs it, at most so long, its output in the log.
step() {
    local limit=$1 name=$2 start left code
    shift 2
    start=$(date +%s)
    left=$((until - start))
    if [ "$left" -le 2 ]; then
        echo "-- $name: not run, no time is left" >>"$log"
        failed=1
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $name" >>"$log"
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    echo "-- $name: exit $code after $(($(date +%s) - start)) s" >>"$log"
    [ $code = 0 ] || failed=1
}

# gpus KVGPU COUNT: fails, and says why, where there are fewer GPUs.
gpus() {
    local said count
    if ! said=$(timeout 60 "$1" facts 2>&1); then
        echo "nothing is run: $(sed -n "s/^Error: //p" <<<"$said" | head -n 1)"
        return 1
    fi
    count=$(grep -cE "^GPU [0-9]" <<<"$said")
    if [ "$count" -lt "$2" ]; then
        echo "nothing is run: $2 GPUs are needed, here are $count"
        return 1
    fi
}

# unpack_rivals FOLDER: the other engines' wheels, if any were packed.
unpack_rivals() {
    local folder=$1
    [ -s "$folder/rivals.tar.xz" ] || return 0
    mkdir -p "$folder/site" && tar -xJf "$folder/rivals.tar.xz" -C "$folder/site"
    PYTHONPATH=$folder/site${PYTHONPATH:+:$PYTHONPATH}
}
