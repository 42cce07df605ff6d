#!/usr/bin/env bash
# Writes requirements.lock: exact versions for Python 3.10 and later, without index or host names.
# Run by `make lock` in an environment where uv is installed (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "cin_fast: uv is missing: .venv/bin/pip install uv" >&2; exit 1; }

UV_PYTHON_DOWNLOADS=never uv pip compile --quiet --universal --python-version 3.10 --upgrade \
    --all-extras --no-emit-index-url --no-annotate --custom-compile-command "make lock" \
    --output-file requirements.lock pyproject.toml
