# Sourced by the other scripts: makes .venv with the versions in constraints.txt, once, and puts it on the PATH.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: need Python 3.10, 3.11 or 3.12; set PYTHON=/path/to/python" >&2
    return 1
}

stamp=.venv/installed
# Without the settings of ruff and what comes after them, which need no other environment.
wanted=$(sed '/^\[tool\.ruff\]/,$d' pyproject.toml | cat - setup.py constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python)
    echo "setting up .venv with $("$python" --version), about a minute" >&2
    rm -rf .venv
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
# Ranks share the cores; more threads than that only get into each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
