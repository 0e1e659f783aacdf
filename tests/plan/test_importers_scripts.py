"""Shell scripts as people write them become recipes, and are never executed."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import InputError
from anychip.plan.importers import import_recipe
from anychip.plan.importers.shell import read_script
from anychip.plan.importers.shell.arithmetic import evaluate

SCRIPT = """#!/bin/bash
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NNODES=${SLURM_NNODES:-16}
WORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))
TP=8; PP=${PP:-4}
CHECKPOINT_PATH=$1
LAUNCH=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NNODES
)
MODEL=(
    --num-layers 80   # layers (all of them)
    --hidden-size 8192 --ffn-hidden-size 28672
    # --hidden-size 1
    --num-attention-heads 64 --group-query-attention --num-query-groups 8
    --seq-length 8192 --max-position-embeddings 8192
    --swiglu --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --disable-bias-linear --vocab-size 128256
)
TRAINING=(--micro-batch-size 1 --global-batch-size 1024 --train-iters 100 --bf16 --lr 6.0e-5
    --hidden-dropout 0 --use-distributed-optimizer --sequence-parallel --load "$CHECKPOINT_PATH")
SPLIT=(
	--tensor-model-parallel-size ${TP}
	--pipeline-model-parallel-size $PP
)
torchrun ${LAUNCH[@]} pretrain_gpt.py ${MODEL[@]} "${TRAINING[@]}" ${SPLIT[@]} "$@" 2>&1 | tee $HOME/log.txt
"""


def imported(folder: Path, text: str) -> tuple[dict[str, Any], str]:
    path = folder / "pretrain.sh"
    path.write_text(text, encoding="utf-8")
    found = import_recipe(path)
    return found.recipe, "\n".join(found.notes)


def words_of(text: str) -> list[str]:
    return read_script(text, "--num-layers").words


def notes_of(text: str) -> str:
    return "\n".join(read_script(text, "--num-layers").notes)


def test_all_arguments_may_come_from_variables(tmp_path: Path) -> None:
    recipe, notes = imported(tmp_path, SCRIPT)
    assert recipe["model"]["num_hidden_layers"] == 80 and recipe["model"]["hidden_size"] == 8192
    assert recipe["parallel"] == {"tensor_parallel": 8, "pipeline_parallel": 4, "data_parallel_shard": 4}
    assert "SLURM_NNODES=16, PP=4" in notes and "($@)" in notes and "$1, $HOME" in notes
    assert "arguments without a counterpart" not in notes


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("TP=8; PP=4\nx --t $TP --p $PP", ["x", "--t", "8", "--p", "4"]),
        ('A="a; b" ; x --a "$A"', ["x", "--a", "a; b"]),
        ("PP=${PP:-4}\nx --p $PP ${Q:-${PP}5}", ["x", "--p", "4", "45"]),
        ("export A=1 B=2\nreadonly C='3'\nf() {\n  local D=4\n}\nx --a $A$B$C ${D}", ["x", "--a", "123", "4"]),
        ('A=7\nB="--n ${A} --m $A"\nx $B', ["x", "--n", "7", "--m", "7"]),
        ('A=(--a)\nA+=(--b 2)\nA+=(--c "x y")\nx ${A[@]} ${A[2]}', ["x", "--a", "--b", "2", "--c", "x y", "2"]),
        ('A="--a 1"\nA+=" --b 2"\nA="${A} --c"\nx $A', ["x", "--a", "1", "--b", "2", "--c"]),
        ('A=" \\\n  --a 1 \\\n  # --b 2 \\\n  --c 3"\nx $A', ["x", "--a", "1", "--c", "3"]),
        ("x --a 1 \\\n  # --b 2 \\\n  --c 3", ["x", "--a", "1", "--c", "3"]),
        ("x --a $((2 * (3 + 4) % 5 - 10 / 3))", ["x", "--a", "1"]),
        ("N=4\nG=$(($N*8))\nx --a $((G / N + 1))", ["x", "--a", "9"]),
        ("x --a ${1:-5} --b ${2}", ["x", "--a", "5", "--b", "${2}"]),
        ("x --a $HOME/y --b $(hostname) --c `date`", ["x", "--a", "/y", "--b", "$(hostname)", "--c", "`date`"]),
        ("cat > f <<EOF\nx --num-layers 3\nEOF\nx --num-layers 4 > log &", ["x", "--num-layers", "4"]),
        ("tool --in f\ntorchrun x --num-layers 4\ntool --out f", ["torchrun", "x", "--num-layers", "4"]),
        ('C="x --a 1 --num-layers 2"\nsrun bash -c "$C"\necho $C', ["srun", "bash", "-c", "x", "--a", "1",
                                                                   "--num-layers", "2"]),
        ("--a 1\n--b 2\n", ["--a", "1", "--b", "2"]),
        ("D=0 x --a 1 | tee --append f", ["x", "--a", "1", "tee", "--append", "f"]),
        ("for s in 3 4; do\n  x --a $s\ndone", ["x", "--a", "3"]),
        ("(cd y; x --a 1)", ["x", "--a", "1"]),
    ],
)  # fmt: skip
def test_shell_syntax(script: str, words: list[str]) -> None:
    assert words_of(script) == words


CHOICE = """SIZE=${SIZE:-7}
if   [ ${SIZE} == 3 ];   then L=16; H=1;
elif [ ${SIZE} == 7 ];   then L=32; H=2;
else L=1; fi
case $SIZE in
  3|13) F=1 ;;
  "7") F=77 ;;
  *) F=0;;
esac
if [[ $L -gt 16 ]]; then A="--deep"; fi
if [ -z "$A" ]; then A="--no"; fi
if [ -f /etc/hosts ]; then B=1; else B=2; fi
x --l $L --h $H --f $F $A --b $B
"""


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("7", ["x", "--l", "32", "--h", "2", "--f", "77", "--deep", "--b", "1"]),
        ("3", ["x", "--l", "16", "--h", "1", "--f", "1", "--no", "--b", "1"]),
        ("9", ["x", "--l", "1", "--h", "--f", "0", "--no", "--b", "1"]),
    ],
)
def test_the_branch_that_the_script_itself_decides_is_read(size: str, words: list[str]) -> None:
    found = words_of(CHOICE.replace(":-7", f":-{size}"))
    assert [word for word in found if word != "$H"] == words


def test_notes_say_which_branch_and_which_files_were_read() -> None:
    notes = notes_of("source env.sh\n. ../more.sh\n" + CHOICE)
    assert "line 4 `[ ${SIZE} == 3 ]`: does not hold" in notes
    assert "line 5 `[ ${SIZE} == 7 ]`: holds, its branch was read" in notes
    assert "line 14 `[ -f /etc/hosts ]`: unknown, its branch was read" in notes
    assert "env.sh, ../more.sh" in notes and "SIZE=7" in notes


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    text = (
        f"touch {mark}\nA=$(touch {mark})\nB=`touch {mark}`\neval touch {mark}\nC=$((__import__('os')))\nx --a $A$B$C"
    )
    notes = notes_of(text)
    assert not mark.exists() and "were not run" in notes


def test_a_missing_value_is_refused_only_where_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--num-layers is '\$1'"):
        imported(tmp_path, SCRIPT.replace("TP=8", "TP=8; N=$1").replace("--num-layers 80", "--num-layers $N"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7), ("(1+2)*3", 9), ("-7/2", -3), ("-7%2", -1), ("A*-B", -6), ("$A + ${B}", 5), ("- -2", 2),
        ("1/0", None), ("2**3", None), ("1.5", None), ("", None), ("(1", None), ("1 2", None), ("A=3", None),
        ("9223372036854775807+1", None), ("(" * 500 + "1" + ")" * 500, None), ("x", None),
    ],
)  # fmt: skip
def test_arithmetic(text: str, value: int | None) -> None:
    assert evaluate(text, {"A": "2", "B": "3", "x": "many"}.__getitem__) == value


FRAGMENTS = st.sampled_from([
    "A=", "A+=", "$A", "${A}", "${A[@]}", "${A:-", "}", "(", ")", "((", "$((", "))", "$(", "`", '"', "'", "\\", "\n",
    ";", ";;", "|", "&", "if ", "then ", "elif ", "else ", "fi ", "case ", " in ", "esac ", "for ", "do ", "done ",
    " [ ", " ] ", "[[ ", " ]]", "# ", "<<E", "\nE\n", ">", "--num-layers", " 4 ", " --bf16 ", "x", "=", "{", "f()",
    "export ", "source ", "1", "*", "/", "-", "$@", "$1", "\x00", "é",
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(FRAGMENTS, max_size=60).map("".join))
def test_any_pieces_of_scripts_give_words_or_a_refusal(text: str) -> None:
    with contextlib.suppress(InputError):
        read_script(text, "--num-layers")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(SCRIPT)), st.lists(FRAGMENTS, max_size=3).map("".join), st.integers(0, 40))
def test_a_damaged_script_gives_a_recipe_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, at: int, put: str, cut: int
) -> None:
    with contextlib.suppress(InputError):
        imported(tmp_path_factory.getbasetemp(), SCRIPT[:at] + put + SCRIPT[at + cut :])


@pytest.mark.parametrize(
    "text",
    [
        "x --a " + "${A:-" * 100_000,
        "x --a " + "${A:-" * 5000 + "}" * 5000,
        "x --a " + "$(" * 200_000,
        "A=x\n" + "A=$A$A\n" * 60 + "x --a $A",
        "A=(${A[@]} ${A[@]} x)\n" * 60 + "x --a ${A[@]}",
        "A=" + "x" * 200_000 + "\n" + "B=$A\n" * 50_000 + "x --a 1",
        "if [ a ]; then\n" * 50_000 + "x --a 1",
        "x --a " + "1" * 900_000,
        "x " + "--a b " * 150_000,
        'x "' * 200_000,
        "A=(" * 200_000,
        "A=(1) " * 100_000,
        "x <<E\n" * 100_000,
        "case $A in a) " * 50_000,
        "x --num-layers $((" + "(" * 400_000,
        "x --a b --num-layers 1\n" * 30_000,
        "--moe-layer-freq [" + "0," * 300_000 + "1]*9999 --num-experts 8",
    ],
    ids=range(17),
)
def test_no_text_takes_long(tmp_path: Path, text: str) -> None:
    begun = time.process_time()
    with contextlib.suppress(InputError):
        imported(tmp_path, text[:250_000])
    assert time.process_time() - begun < 10
