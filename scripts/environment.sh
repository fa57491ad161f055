# Sourced by the other scripts: leaves a Python with everything installed in $PYTHON.
#
# Makes .venv at the top of the repository if it is missing, and installs again when pyproject.toml,
# setup.py, constraints.txt or the C++ sources have changed since. PYTHON=/path/to/python chooses the
# interpreter; if that has torch, .venv uses it. TORCH_INDEX_URL is an index to take torch from, such
# as one with builds for CPUs alone, which are a tenth of those with CUDA.
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

# Lets .venv see the packages of the interpreter that it is made with, if torch is among them: a
# folder in a .pth file comes after what .venv has itself. Unlike --system-site-packages, this also
# works for an interpreter of another virtual environment.
laer_use_torch_of() {
    [[ -z ${TORCH_INDEX_URL:-} ]] || return 0
    "$1" - "$laer_venv" <<'EOF'
import importlib.metadata, pathlib, re, sys
try:
    torch = importlib.metadata.distribution("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit()
version = [int(number) for number in re.findall(r"\d+", torch.version)[:2]]
if version >= [2, 6]:  # as in pyproject.toml
    folder = "lib/python{}.{}/site-packages".format(*sys.version_info)
    venv = pathlib.Path(sys.argv[1])
    (venv / folder / "torch-elsewhere.pth").write_text(f"{torch.locate_file('')}\n")
    (venv / "torch-elsewhere").write_text(f"torch=={torch.version}\n")
EOF
    [[ -f $laer_venv/torch-elsewhere ]] || return 0
    # The one next to that torch starts ranks with a Python that has no Megatron.
    printf '#!/bin/sh\nexec "%s/bin/python" -m torch.distributed.run "$@"\n' "$laer_venv" \
        >"$laer_venv/bin/torchrun"
    chmod +x "$laer_venv/bin/torchrun"
}

laer_install() {
    local pip=("$laer_venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off)
    local constraints=$laer_root/constraints.txt elsewhere=$laer_venv/torch-elsewhere
    local index_url=${TORCH_INDEX_URL:-} size
    if [[ -f $elsewhere ]]; then
        index_url='' size="$(<"$elsewhere") is there already; Megatron and tools"
        size+=" are 0.14 GB to download and 0.6 GB on disk: some 3 minutes"
        # Another version than the tested one may be there.
        { grep -v '^torch==' "$constraints"; cat "$elsewhere"; } >"$laer_venv/constraints.txt"
        constraints=$laer_venv/constraints.txt
    elif [[ -n $index_url ]]; then
        size="torch from TORCH_INDEX_URL, Megatron and tools; if torch is built for CPUs alone, that"
        size+=" is 0.3 GB to download and 1.2 GB on disk: some 4 minutes"
    else
        size="torch with CUDA, Megatron and tools; that is 3.2 GB to download and 5.8 GB on disk: some"
        size+=" 10 minutes. 0.3 and 1.2 GB with TORCH_INDEX_URL: docs/start.md"
    fi
    if [[ -f $laer_venv/stamp ]]; then
        echo "Updating .venv, since the checkout has changed since it was installed ..."
    else
        # An estimate: a line of 100 Mbit/s, two to five minutes to unpack and to build the core.
        echo "Installing into .venv: $size ..."
    fi
    if ! {
        # Alone, since such an index has few other packages; what torch needs comes with the rest.
        { [[ -z $index_url ]] ||
            "${pip[@]}" --no-deps --index-url "$index_url" "$(grep '^torch==' "$constraints")"; } &&
            "${pip[@]}" --constraint "$constraints" --editable "${laer_root}[test]"
    } 2>&1 | tee "$laer_log" | laer_progress; then
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
        echo "Installing $1 as megatron-core next to the other ..."
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
        laer_use_torch_of "$python"
    fi
    if [[ "$(cat "$laer_venv/stamp" 2>/dev/null)" != "$stamp" ]]; then
        laer_check_compiler
        laer_install
        printf '%s\n' "$stamp" >"$laer_venv/stamp"
    fi
    PYTHON=$laer_venv/bin/python
}

laer_environment
