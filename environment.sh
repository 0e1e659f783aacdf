# Sourced by demo.sh and test.sh: a virtual environment in .venv with anychip and the extras named in $1.
# PYTHON chooses the interpreter. The stamp makes a second call instant.
set -euo pipefail
PYTHON="${PYTHON:-python3}"
stamp=".venv/.installed-$(echo "$1" | tr ',' '-')-$(cksum < pyproject.toml | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    "$PYTHON" -c 'import sys; sys.exit("anychip needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    echo "installing anychip[$1] into .venv (once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
fi
