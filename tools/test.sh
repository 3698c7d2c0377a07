#!/usr/bin/env bash
# The whole test suite, in two processes at a time. Further arguments go to pytest.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python tools/compile_ops.py
exec python -m pytest -n 2 --dist worksteal "$@"
