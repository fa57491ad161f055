#!/usr/bin/env bash
# Lint, types, layers and tests.
#
#   scripts/test.sh               the quick set: tests marked unit
#   scripts/test.sh --all         everything that needs no GPU (also with CI=true)
#   scripts/test.sh --gpu         the tests that need one
#   scripts/test.sh ... -- ARGS   ARGS are given to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=unit
[[ ${CI:-} == true ]] && selection="not gpu"
while (($#)); do
    case $1 in
        --all) selection="not gpu" ;;
        --gpu) selection=gpu ;;
        --) shift && break ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit ;;
        *) echo "unknown option $1; allowed are --all, --gpu, and -- followed by pytest's" >&2 && exit 2 ;;
    esac
    shift
done
source scripts/environment.sh

# All of them run, so that one look shows everything; pytest comes last, with its summary.
failed=()
check() {
    echo "== $1"
    "$PYTHON" -m "${@:2}" || failed+=("$1")
}
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check mypy mypy
echo "== import-linter"
.venv/bin/lint-imports || failed+=(import-linter)
((${#failed[@]} == 0)) || echo "FAILED: ${failed[*]} (the tests follow)"

echo "== pytest -m '$selection'"
# Ends when pytest has printed its summary, whatever a test left running.
"$PYTHON" -m tests.supervise -m "$selection" --durations 20 "$@" || exit
((${#failed[@]} == 0))
