#!/bin/sh
# Makes a virtual environment at the root of the checkout, or leaves it as it is if it is up to date.
#
#   scripts/environment.sh .venv
#
# The interpreter is $PYTHON if that is set (a command, or a version such as 3.12), otherwise the
# first version in the environment's list that is installed. The packages are installed by uv: one on
# PATH, otherwise one that pip installs into the environment; by pip if neither works.
set -eu
cd "$(dirname "$0")/.."
export UV_PYTHON_DOWNLOADS=never # an interpreter of this machine, or none

folder=$1
stamp=$folder/.ready

say() { echo "$folder: $*" >&2; }

# --- Interpreters --------------------------------------------------------------------------------

# pyenv puts commands on PATH that fail for every version but the selected one, and some systems ship
# Python without what makes environments. A candidate counts only if it runs and has that.
usable() {
    "$1" -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1
}

first_usable() {
    while read -r candidate; do
        if usable "$candidate"; then echo "$candidate" && return; fi
    done
    return 1
}

# Every place where an interpreter of a version may be, one a line.
places() {
    command -v "python$1" || true
    # shellcheck disable=SC2012 # newest first
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/"python$1" 2>/dev/null | sort -rV || true
    # Managed ones only: the commands of pyenv make a search of PATH fail.
    [ -z "$path_uv" ] || "$path_uv" python find --managed-python "$1" 2>/dev/null || true
}

find_python() {
    case ${PYTHON:-} in
        "") ;;
        [0-9]*) set -- "$PYTHON" ;;
        *) echo "$PYTHON" | first_usable && return ;;
    esac
    {
        for version; do places "$version"; done
        [ -n "${PYTHON:-}" ] || { echo python3 && echo python; } # perhaps a newer one
    } | first_usable && return
    say "no such Python with venv and pip is installed: ${PYTHON:-3.11 or newer}"
    return 1
}

# --- Installers ----------------------------------------------------------------------------------

pip() { "$folder/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python "$folder/bin/python" "$@"
    else
        pip install --quiet "$@"
    fi
}

# An empty environment, with pip and, if at all possible, with uv.
create() {
    rm -rf "$folder"
    "$python" -m venv "$folder"
    uv=$path_uv
    if [ -z "$uv" ] && pip install --quiet uv; then
        uv=$folder/bin/uv
    fi
    if [ -z "$uv" ]; then
        say "uv cannot be installed; pip takes minutes for what uv does in seconds"
        # Old versions of pip search this set of dependencies for a quarter of an hour.
        pip install --quiet --upgrade pip
    fi
}

# --- Environments --------------------------------------------------------------------------------

# Versions of Python, the preferred one first.
case $folder in
    .venv | .venv-interop-jax) versions="3.13 3.12 3.11" ;;
    .venv-oldest | .venv-interop) versions="3.11 3.12 3.13" ;;
    *) say "no such environment" && exit 2 ;;
esac

fill() {
    case $folder in
        .venv)
            install --editable ".[test]"
            ;;
        # What users install at the lowest versions that pyproject.toml allows; the newest test tools.
        .venv-oldest)
            [ -n "$uv" ] || { say "needs uv, which alone finds the lowest versions" && return 1; }
            install --resolution lowest-direct --editable ".[demo,gguf]"
            install --editable ".[test]"
            ;;
        # torch comes first and alone: pip takes the build that this machine provides, if it provides
        # one, and everything after it keeps to that build. AIMET would ask for another build.
        .venv-interop)
            pip install --quiet torch==2.13.0
            install --editable ".[test,interop]"
            install --no-deps aimet-torch==2.42.0
            ;;
        # The whole of gemma asks for a training stack, of which `gemma.peft` imports nothing.
        .venv-interop-jax)
            install --editable ".[test,interop-jax]"
            install --no-deps gemma==4.0.1
            ;;
    esac
}

# The environment is whole: the last thing that an installation writes is there and knows the same
# requirements, the interpreter runs and is the one asked for, and the package is that of this checkout.
up_to_date() {
    [ "$(cat "$stamp" 2>/dev/null)" = "$requirements" ] && "$folder/bin/python" -P - <<END 2>/dev/null
import importlib.util, os, subprocess, sys
assert os.path.samefile(importlib.util.find_spec("peft_jax").origin, "peft_jax/__init__.py")
if python := os.environ.get("PYTHON"):
    if not python[0].isdigit():
        python = subprocess.check_output([python, "-c", "import sys; print(sys.version)"], text=True)
    assert python.split(".")[:2] == sys.version.split(".")[:2]
END
}

requirements=$(cat pyproject.toml scripts/environment.sh | cksum)
if up_to_date; then exit; fi

path_uv=$(command -v uv || true)
[ -z "$path_uv" ] || "$path_uv" --version >/dev/null 2>&1 || path_uv=
# shellcheck disable=SC2086 # words
python=$(find_python $versions)
say "installing, with $("$python" --version); this takes seconds, or a few minutes the first time ..."
create
fill
echo "$requirements" >"$stamp"
