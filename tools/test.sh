#!/usr/bin/env bash
# The whole test suite. Further arguments go to pytest.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m pytest "$@"
