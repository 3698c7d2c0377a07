#!/usr/bin/env bash
# The whole test suite. Arguments go to pytest (python -m pytest --help).

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2s/^# //p' "$0"
    exit
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m pytest "$@"
