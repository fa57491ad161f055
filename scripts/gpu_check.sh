#!/usr/bin/env bash
# What a card shows, in the order of risk: gradients with streams held up, the first replicas late in
# a run, and step times of one recipe; then exchanges, kernels and parity. Without a network, in under
# nine minutes on one card. Each part has its own log and limit; at the end come the ten figures that
# matter most. docs/gpu_status.md says what to do with the result.
#
#   scripts/gpu_check.sh --wheels DIR           one card; torch and Triton are the machine's
#   scripts/gpu_check.sh --wheels DIR --ranks 8  also what needs several cards, in 18 minutes
#   scripts/gpu_check.sh --dry-run              the same without a card, at tiny sizes: tensors on
#                                               the CPU are labelled as a card's
#
# --wheels DIR  wheels of what the machine lacks: megatron-core, and what builds and tests this
#               project. Fill it where there is a network, with the same version of Python:
#                 python -m pip download --no-deps --dest DIR megatron-core setuptools pybind11 \
#                     wheel packaging psutil pyyaml tqdm pytest iniconfig pluggy pygments \
#                     hypothesis sortedcontainers einops numpy
#               Without it, PYTHON must have all of that.
#
# The machine also needs a C++ compiler and Python.h (g++ and python3-dev): the native core is built
# from this checkout, which must be writable, and Triton compiles its launchers.
#
# Other options are those of `python -m benchmarks.gpu --help`. PYTHON chooses the interpreter that
# has torch; default: .venv's of this repository, else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
    printf 'gpu_check: %s\n' "$@" >&2
    exit 2
}

python=${PYTHON:-}
[[ -n $python ]] || { [[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python3; }
wheels='' options=()
while (($#)); do
    case $1 in
        --wheels)
            [[ -n ${2:-} ]] || stop "--wheels needs a folder"
            wheels=$2
            shift
            ;;
        -h | --help) sed -n '2,27s/^# \{0,1\}//p' scripts/gpu_check.sh && exit ;;
        *) options+=("$1") ;;
    esac
    shift
done
type -P "$python" >/dev/null || stop "no Python at $python; set PYTHON to the one that has torch"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' ||
    stop "$python is $("$python" --version 2>&1); 3.12 or newer is needed; set PYTHON to such a one"
"$python" -c 'import torch' 2>/dev/null ||
    stop "$python has no torch; set PYTHON to the one that has"

if [[ -n $wheels ]]; then
    compgen -G "$wheels/megatron_core-*.whl" >/dev/null ||
        stop "--wheels $wheels holds no wheel of megatron-core; fill it where there is a network:" \
            "python -m pip download --no-deps --dest $wheels megatron-core (all of them: --help)"
    venv=${VENV:-gpu-check/venv}
    "$python" -m venv --clear --system-site-packages "$venv" ||
        stop "$python could not make $venv; on Debian and Ubuntu: apt-get install python3-venv"
    # A venv made in a venv sees the outer one's base only.
    "$python" -c 'import site; print("\n".join(site.getsitepackages()))' \
        >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/machine.pth"
    log=$venv/install.log
    install=("$venv/bin/python" -m pip install --disable-pip-version-check --no-index --no-deps)
    "${install[@]}" "$wheels"/*.whl >"$log" 2>&1 ||
        stop "the wheels of $wheels could not be installed; pip's output is in $log:" "$(tail -3 "$log")"
    python=$venv/bin/python
    "$python" setup.py -q build_ext --inplace >>"$log" 2>&1 ||
        stop "the native core could not be built; the output is in $log:" "$(tail -3 "$log")"
fi
"$python" -c 'import numpy' 2>/dev/null ||
    stop "$python has no numpy, which torch does not bring; give --wheels DIR (--help)"
"$python" -c 'import importlib.util, megatron_laer.planner.native_core, sys
sys.exit(importlib.util.find_spec("megatron.core") is None)' 2>/dev/null ||
    stop "$python has no megatron-core, or the native core is not built; give --wheels DIR (--help)"
exec "$python" -m benchmarks.gpu "${options[@]}"
