#!/bin/sh
# The quick suite on the newest JAX that pyproject.toml admits, in an environment of its own.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo "$PWD/.tools/bin/uv")
"$uv" venv --quiet --allow-existing --python .venv/bin/python .venv-newest
UV_PROJECT_ENVIRONMENT=.venv-newest "$uv" sync --quiet --frozen --extra data --group test --python .venv-newest/bin/python
"$uv" --no-config pip install --quiet --upgrade --python .venv-newest/bin/python 'jax>=0.12,<0.13' jaxlib
.venv-newest/bin/python -c 'import jax; print("jax", jax.__version__)'
.venv-newest/bin/python -m pytest -m "not slow and not gpu" -n 2 --dist worksteal
