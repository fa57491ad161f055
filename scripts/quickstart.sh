#!/usr/bin/env bash
# Trains a small MoE GPT on this machine's CPU with FSEP, then with stock expert parallelism, and
# compares them. Options are passed on; see scripts/quickstart.sh --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
exec "$PYTHON" scripts/quickstart.py "$@"
