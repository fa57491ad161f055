#!/usr/bin/env bash
# Shows that a change has changed no number: trains a small model for 30 steps with two commits, and
# compares losses, gradient norms, layouts and checkpoints bit for bit. Options are passed on:
#
#   scripts/compare_commits.sh BEFORE AFTER [--steps 30]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
exec "$PYTHON" -m tests.compare_commits "$@"
