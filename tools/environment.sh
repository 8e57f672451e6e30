# Sourced by tools/test and tools/demo: find a Python, make virtual environments in .venv/ and keep them until setup.cfg changes.

# find_python 3.8 3.11: print the newest Python between these two that runs here. $PYTHON is asked first.
find_python() {
    local low=${1#3.} high=${2#3.} minor candidate
    for candidate in ${PYTHON:-} $(for minor in $(seq "$high" -1 "$low"); do
                echo "python3.$minor" "$HOME"/.pyenv/versions/3."$minor".*/bin/python; done) python3 python; do
        if "$candidate" -c "import sys; sys.exit(not (3, $low) <= sys.version_info[:2] <= (3, $high))" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# make_environment NAME PYTHON REQUIREMENT...: print the Python of .venv/NAME-<version>, in which pip has installed all of them
# in one go (one after the other, scipy would bring a NumPy with which MXNet cannot be imported).
make_environment() {
    local name python=$2 folder key log
    name=$1-$("$python" -c 'import platform; print(platform.python_version())')
    shift 2
    folder=$PWD/.venv/$name
    log=$folder.log
    key=$(echo "$PWD $*" | cat - setup.cfg pyproject.toml | cksum)
    if [ "$key" != "$(cat "$folder/complete" 2>/dev/null)" ]; then
        echo "making .venv/$name (once; some minutes) ..." >&2
        rm -rf "$folder"
        mkdir -p .venv
        if ! { new_venv "$python" "$folder" && "$folder/bin/python" -m pip install "$@"; } > "$log" 2>&1; then
            tail -20 "$log" >&2
            echo "could not make .venv/$name; the whole story is in $log" >&2
            return 1
        fi
        echo "$key" > "$folder/complete"
    fi
    echo "$folder/bin/python"
}

# Debian's Python has no ensurepip unless python3-venv is installed; its pip can fill an environment all the same.
new_venv() {
    "$1" -m venv "$2" || { "$1" -m venv --clear --without-pip "$2" && "$1" -m pip --python "$2/bin/python" install pip; }
}

# On Linux PyPI's torch brings gigabytes of CUDA: take PyTorch's own index of CPU builds too where it can be reached.
torch=("torch==2.13.0; python_version >= '3.10'" "torch; python_version < '3.10'")
triton=("triton; python_version >= '3.10' and sys_platform == 'linux' and platform_machine == 'x86_64'")
cpu_index=https://download.pytorch.org/whl/cpu
cpu_index_reachable() {
    "$1" -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null
}
choose_torch() {
    if [ "$(uname)" = Linux ] && cpu_index_reachable "$1"; then
        torch+=(--extra-index-url "$cpu_index")
    fi
}
