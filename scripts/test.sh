#!/usr/bin/env bash
# Lint, types, layers, spelling and tests.
#
#   scripts/test.sh               the quick set: tests marked unit or quick
#   scripts/test.sh --all         everything that needs no GPU (also with CI=true), and then what is
#                                 marked `releases` once more, with the oldest Megatron supported
#   scripts/test.sh --nightly     what --all leaves out, because it takes long or needs more tools;
#                                 then what is marked `releases`, with the checkout of Megatron's
#                                 main branch that MEGATRON_LM_NEXT names, if it does
#   scripts/test.sh --gpu         the tests that need one
#   scripts/test.sh --lint        no tests
#   scripts/test.sh --training    the chosen set without the tests of tools: with --all, everything of
#                                 training
#   scripts/test.sh --megatron X  the chosen set with megatron-core X, or a checkout's folder, instead
#   scripts/test.sh ... -- ARGS   ARGS are given to pytest, which then runs once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

everything="not gpu and not nightly"
selection="(unit or quick) and not nightly"
[[ ${CI:-} == true ]] && selection=$everything
megatron=
left_out=()
while (($#)); do
    case $1 in
        --all) selection=$everything ;;
        --nightly) selection="nightly and not gpu" ;;
        --gpu) selection=gpu ;;
        --lint) selection= ;;
        --training) left_out=(--ignore tests/tools) ;;
        --megatron)
            megatron=${2:-}
            if [[ $megatron != [0-9]* && ! -f $megatron/megatron/core/package_info.py ]]; then
                echo "--megatron '$megatron' is no version; give one, such as 0.X.Y, of megatron_laer/releases.py, or a checkout's folder" >&2 && exit 2
            fi
            shift
            ;;
        --) shift && break ;;
        -h | --help) sed -n '2,15s/^# \{0,1\}//p' scripts/test.sh && exit ;;
        *) echo "unknown option $1; allowed are --all, --nightly, --gpu, --lint, --training, --megatron X, and -- followed by pytest's" >&2 && exit 2 ;;
    esac
    shift
done
source scripts/environment.sh
# Hundreds of processes import the package, and some machines let Python compile it anew in each.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$PWD/.venv/pycache

# All of them run, so that one look shows everything; pytest comes last, with its summary.
failed=()
check() {
    echo "== $1"
    "$PYTHON" -m "${@:2}" || failed+=("$1")
}
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check mypy mypy
check codespell codespell_lib ./*.md benchmarks configs docs megatron_laer patches scripts tests
echo "== import-linter"
# By its function, since `.venv` has no program for it where another Python lends its packages.
"$PYTHON" -c 'from importlinter.cli import lint_imports_command as run; run()' --no-cache || failed+=(import-linter)
finish() {
    ((${#failed[@]} == 0)) && exit
    echo "FAILED: ${failed[*]}" && exit 1
}
[[ -n $selection ]] || finish
((${#failed[@]} == 0)) || echo "FAILED: ${failed[*]} (the tests follow)"

case $selection in
    "$everything") set=--all ;;
    nightly*) set=--nightly ;;
    gpu) set=--gpu ;;
    *) set= ;;
esac

# Ends when pytest has printed its summary, whatever a test left running. Files are spread over three
# workers, since ranks wait for each other a third of the time; given arguments, pytest runs alone,
# so that -s, --pdb and -x mean what they say.
run_tests() {
    local with=${megatron:+ with megatron-core $megatron} status=0 arguments=("${@:2}") files=()
    ((${#arguments[@]})) || arguments=(--numprocesses 3 --dist loadfile --no-loadscope-reorder)
    # Few files have such tests, and a worker needs half a minute to import all.
    [[ $1 != *" and releases" ]] ||
        mapfile -t files < <(grep -rl --include "*.py" ${left_out:+--exclude-dir tools} mark.releases tests)
    echo "== pytest -m '$1'$with"
    "$PYTHON" -m tests.supervise -m "$1" --durations 20 "${left_out[@]}" "${arguments[@]}" "${files[@]}" || status=$?
    ((status < 2)) || exit "$status" # interrupted, or there was nothing to run
    ((status == 0)) || failed+=("tests$with")
    # What a whole set passed with is on a page of docs/.
    if ((status == 0 && $# == 1 && ${#failed[@]} == 0)) && [[ -n $set && -z ${left_out[*]} ]]; then
        [[ $1 != *" and releases" ]] || set+=", marked releases"
        "$PYTHON" -m tests.site_pages --passed "scripts/test.sh $set"
    fi
}
[[ -z $megatron ]] || laer_use_megatron "$megatron"
run_tests "$selection" "$@"
if [[ -z $megatron ]] && (($# == 0)); then
    case $selection in
        "$everything")
            megatron=$("$PYTHON" -c "from megatron_laer.releases import TESTED; print(TESTED[0])")
            ;;
        nightly*)
            megatron=${MEGATRON_LM_NEXT:-} everything="not gpu"
            export MEGATRON_LM_CHECKOUT=$megatron
            ;;
    esac
    if [[ -n $megatron ]]; then
        laer_use_megatron "$megatron"
        run_tests "$everything and releases"
    fi
fi
finish
