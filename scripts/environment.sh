# Sourced by the other scripts: leaves a Python with everything installed in $PYTHON.
#
# Makes .venv at the top of the repository if it is missing, and installs again when pyproject.toml,
# setup.py, constraints.txt or the C++ sources have changed since. PYTHON=/path/to/python chooses the
# interpreter.
# shellcheck shell=bash

laer_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
laer_venv=$laer_root/.venv
laer_log=$laer_venv/install.log

laer_stop() {
    printf '%s\n' "$@" >&2
    exit 1
}

# A command may exist and not run (a version manager's shim), so every candidate is tried.
laer_runs() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# Tested versions first.
laer_find_python() {
    local name candidate without_venv=
    for name in ${PYTHON:-python3.13 python3.12 python3 python python3.14}; do
        while read -r candidate; do
            laer_runs "$candidate" || continue
            if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
                printf '%s\n' "$candidate"
                return
            fi
            without_venv=$candidate
        done < <(type -aP "$name"; [[ $name == python3.* ]] && printf '/usr/bin/%s\n' "$name")
    done
    if [[ -n $without_venv ]]; then
        laer_stop "$without_venv cannot make virtual environments." \
            "On Debian and Ubuntu: apt-get install python3-venv"
    fi
    laer_stop "No Python 3.12 or newer was found${PYTHON:+ (PYTHON=$PYTHON)}." \
        "On Debian 13 and Ubuntu 24.04: apt-get install python3 python3-venv" \
        "Installed elsewhere: PYTHON=/path/to/python3 $0"
}

laer_check_compiler() {
    local compiler
    for compiler in ${CXX:-c++ g++ clang++}; do
        type -P "$compiler" >/dev/null && return
    done
    echo "No C++ compiler was found${CXX:+ (CXX=$CXX)}. It is needed where a package comes without" \
        "a built wheel for this Python. On Debian and Ubuntu: apt-get install g++ python3-dev" >&2
}

# `name-version (size)` per package instead of pip's output, which is kept in the log.
laer_progress() {
    sed -un -e 's#^ *Downloading \([^ ]*/\)\{0,1\}\([^-/ ]*-[^-/ ]*\)[^ ]* #  \2 #p' \
        -e 's#^Installing collected packages.*#  unpacking#p'
}

laer_install() {
    echo "Installing into .venv (the first time Megatron, torch and tools: 5 GB, some minutes) ..."
    if ! "$laer_venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        --constraint "$laer_root/constraints.txt" --editable "${laer_root}[test]" 2>&1 |
        tee "$laer_log" | laer_progress; then
        grep -i error "$laer_log" | sed 's#[a-z+]*://[^ ,)]*#<address>#g' | head -20 >&2
        laer_check_compiler
        laer_stop "Installation failed; all of pip's output is in $laer_log"
    fi
}

laer_stamp() {
    {
        printf '%s\n' "$laer_root"
        cat "$laer_root/pyproject.toml" "$laer_root/setup.py" "$laer_root/constraints.txt" \
            "$laer_root"/megatron_laer/planner/native/*
    } | sha256sum
}

# Puts another Megatron before the installed one, for this shell and what it starts: a version, or
# what a checkout's folder holds now. Only Megatron differs: what it needs is the same.
laer_use_megatron() {
    local folder=$laer_venv/megatron-$1 wanted=megatron-core==$1
    if [[ -d $1 ]]; then
        folder=$laer_venv/megatron-checkout wanted=$folder.source
        rm -rf "$folder" "$wanted"
        # A copy, since pip builds in the folder, and what an earlier build left there would come too.
        mkdir -p "$wanted"
        tar -C "$1" --exclude=./build -cf - . | tar -C "$wanted" -xf -
    fi
    if [[ ! -d $folder ]]; then
        echo "Installing $1 as megatron-core beside the other ..."
        rm -rf "$folder.part"
        "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps \
            --target "$folder.part" "$wanted" >"$folder.log" 2>&1 ||
            laer_stop "Installation failed; all of pip's output is in $folder.log"
        mv "$folder.part" "$folder"
    fi
    export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH}
    local next
    next=$("$PYTHON" -c "from megatron_laer.releases import NEXT; print(NEXT.number)")
    if compgen -G "$folder/megatron_core-$next.*" >/dev/null; then
        export MEGATRON_LAER_UNRELEASED_MEGATRON=$next
    fi
}

laer_environment() {
    local stamp
    stamp=$(laer_stamp)
    # Not the folder's existence but its interpreter counts: it may have been removed or upgraded.
    if ! laer_runs "$laer_venv/bin/python"; then
        local python
        python=$(laer_find_python) || exit 1
        echo "Making .venv with $("$python" --version) ($python)"
        "$python" -m venv --clear "$laer_venv" || laer_stop "$python could not make $laer_venv"
    fi
    if [[ "$(cat "$laer_venv/stamp" 2>/dev/null)" != "$stamp" ]]; then
        laer_check_compiler
        laer_install
        printf '%s\n' "$stamp" >"$laer_venv/stamp"
    fi
    PYTHON=$laer_venv/bin/python
}

laer_environment
