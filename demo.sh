#!/usr/bin/env bash
# Set everything up and run the main job: text -> tokenizer -> pretraining -> tuning -> evaluation -> export -> report
# -> a signed release.
cd "$(dirname "$0")"
source environment.sh cpu,attest
exec .venv/bin/anychip run recipes/demo.yaml "$@"
