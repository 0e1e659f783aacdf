#!/usr/bin/env bash
# Lint, types and tests, these in two processes. Arguments go to pytest: `./test.sh -m slow` runs the slow suites.
cd "$(dirname "$0")"
source environment.sh cpu,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Files stay whole, since their tests share what was prepared, and in order, so that the longest do not come last.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
exec .venv/bin/python -m pytest -q "$@"
