#!/bin/sh
# Can `make install` work on this machine? Silent if so; otherwise one line naming the fix.
# Usage: preflight.sh PYTHON [VENV]
set -u
python=$1
venv=${2:-.venv}
need_mb=${CIN_FAST_DISK_MB:-10000}

fail() {
    echo "cin_fast: $1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    fail "$python is not on PATH: install Python 3.10 or later (apt-get install python3 python3-venv), or name one: make PYTHON=python3.12"

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "$python does not run: name a working Python 3.10 or later, as in: make PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is Python $version, and 3.10 or later is needed: name one, as in: make PYTHON=python3.12"

"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make a virtual environment: apt-get install python$version-venv"

cxx=${CXX:-g++}
command -v "${cxx%% *}" >/dev/null 2>&1 ||
    fail "no C++ compiler (${cxx%% *}): apt-get install g++"

# PyTorch comes with its CUDA libraries. What is installed already needs no room again.
if ! ls "$venv"/lib/python3.*/site-packages/torch/version.py >/dev/null 2>&1; then
    free_mb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free_mb" -ge "$need_mb" ] ||
        fail "$free_mb MB are free here and the install takes up to $need_mb MB: free some, or clone onto a larger disk"
fi
