#!/bin/sh
# Make .venv hold exactly what uv.lock says, plus the extras and groups named as arguments.
# Finds or installs uv (in .tools) and Python >= 3.12 (also under pyenv); touches nothing else.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }

find_uv() {
    for candidate in "$(command -v uv || true)" .tools/bin/uv; do
        if [ -n "$candidate" ] && "$candidate" --version >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    for python in python3 python3.14 python3.13 python3.12 python; do
        if "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            say "setup: installing uv into .tools"
            "$python" -m venv .tools >&2
            .tools/bin/python -m pip install --quiet --disable-pip-version-check uv >&2
            echo .tools/bin/uv
            return
        fi
    done
    say "setup: found neither uv nor a python3 that can make virtual environments."
    say "       Install uv (https://docs.astral.sh/uv) or the python3-venv package, then try again."
    exit 1
}

# A Python that runs and is 3.12 to 3.14: on the path, under pyenv, or known to uv.
find_python() {
    for candidate in python3.12 python3.13 python3.14 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[34]*/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    UV_PYTHON_INSTALL_DIR="$PWD/.tools/python"
    export UV_PYTHON_INSTALL_DIR
    say "setup: no Python >= 3.12 found; asking uv for 3.12"
    "$1" python install --quiet 3.12 >&2
    "$1" python find 3.12
}

extras=""
for part in "$@"; do
    case "$part" in
        data | cuda | torch) extras="$extras --extra $part" ;;
        test | lint | docs | dev) extras="$extras --group $part" ;;
        *) say "setup: unknown part '$part' (data cuda torch test lint docs dev)"; exit 2 ;;
    esac
done

# Unchanged lock, same parts: nothing to do, also without a network.
stamp=".venv/.dpfa-$(printf '%s' "$*" | tr -c 'a-z0-9\n' '-')"
if [ -f "$stamp" ] && [ "$stamp" -nt uv.lock ] && [ "$stamp" -nt pyproject.toml ] &&
    .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

uv=$(find_uv)
if .venv/bin/python -c '' 2>/dev/null; then python=.venv/bin/python; else python=$(find_python "$uv"); fi
say "setup: $("$python" --version), parts: $*"
# --inexact keeps what an earlier command installed, so that train and test can alternate.
# shellcheck disable=SC2086
VIRTUAL_ENV= UV_PROJECT_ENVIRONMENT=.venv "$uv" sync --quiet --frozen --inexact --python "$python" $extras
touch "$stamp"
