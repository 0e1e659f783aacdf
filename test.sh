#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest: `./test.sh -m slow` runs the slow suites.
cd "$(dirname "$0")"
source environment.sh cpu,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q "$@"
