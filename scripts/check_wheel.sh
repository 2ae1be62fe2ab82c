#!/bin/sh
# Build the wheel, install it into an empty environment without the checkout, import and run it.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo "$PWD/.tools/bin/uv")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$uv" build --quiet --wheel --python .venv/bin/python --out-dir "$work/dist"
"$uv" venv --quiet --python .venv/bin/python "$work/venv"
"$uv" pip install --quiet --python "$work/venv/bin/python" "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/python" - <<'PY'
import dpfa_jax, jax, jax.numpy as jnp, pathlib
assert "site-packages" in dpfa_jax.__file__, dpfa_jax.__file__
assert (pathlib.Path(dpfa_jax.__file__).parent / "py.typed").exists()
x = jax.random.normal(jax.random.key(0), (1, 8, 2, 16))
print("wheel imports; attention gives", dpfa_jax.dot_product_attention(x, x, x).shape)
PY
"$work/venv/bin/dpfa" --help >/dev/null
echo "wheel: built, installed into an empty environment, imported, dpfa --help runs"
