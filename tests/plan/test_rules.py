"""What the search offers is what training takes: each layout of its grid passes training's own checks, and `explain`
says of the others why they are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anychip.cli import main
from anychip.errors import InputError
from anychip.parallel.layout import check_batch, check_layout, resolve_layout
from anychip.plan.layouts import layout_of, overrides_of, parse_layout
from anychip.plan.machine import machine_of_chip
from anychip.plan.rules import left_out
from anychip.plan.search import search
from anychip.plan.shapes import workload_of
from anychip.plan.sites import default_site, trained_here
from anychip.plan.types import Layout
from anychip.recipe import load_recipe

ROOT = Path(__file__).parents[2] / "recipes"
LARGE = ROOT / "telechat2-115b.yaml"
CHIP = ["--chip", "ascend-910b3", "--devices"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["anychip", *words])
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def explain(capsys: pytest.CaptureFixture[str], recipe: str, layout: str, devices: int, *more: str) -> str:
    code, out, err = run(capsys, "plan", "explain", str(ROOT / recipe), layout, *CHIP, str(devices), *more)
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    ("name", "devices", "changes"),
    [
        ("telechat2-115b.yaml", 1024, ["parallel.pipeline_layers=[40,56]"]),
        ("telechat2-7b-32k.yaml", 64, ["parallel.context_method=all_gather"]),
        ("moe-1t.yaml", 4096, []),
    ],
)
def test_training_takes_what_the_search_offers(name: str, devices: int, changes: list[str]) -> None:
    """Also from a recipe whose own layout says otherwise; and reads it as the same layout."""
    recipe = load_recipe(ROOT / name, changes)
    machine, site = machine_of_chip("ascend-910b3", devices), trained_here(default_site("ascend-910b3"))
    workload, method = workload_of(recipe), recipe.parallel.context_method
    found = search(workload, machine, site, context_method=method, keep=20)
    layouts = [one.layout for one in found.rejected if not one.words] + [one.layout for one in found.best]
    assert found.best and len(layouts) > 20
    for layout in [*layouts[:: max(1, len(layouts) // 20)], *layouts[-12:]]:
        assert left_out(workload, layout, machine, site) == (), layout
        chosen = load_recipe(ROOT / name, [*changes, *overrides_of(layout)])
        parallel, training = chosen.parallel, chosen.training
        resolved = resolve_layout(parallel, devices)
        check_layout(parallel, resolved, chosen.model)
        check_batch(parallel, resolved, training.seq_length, training.micro_batch_size, training.global_batch_size)
        again = layout_of(chosen, devices)
        same = ("dp", "tp", "pp", "cp", "ep", "expert_node", "micro_batch", "recompute", "stage_layers")
        assert [getattr(again, field) for field in same] == [getattr(layout, field) for field in same]
        assert again.context_method == method
        assert again.zero == layout.zero or layout.dp * layout.cp == 1
        if layout.pp > 1:
            assert (again.vpp, again.schedule) == (layout.vpp, layout.schedule)


@pytest.mark.parametrize(
    ("recipe", "devices", "layout", "reason"),
    [
        ("moe-1t.yaml", 16_384, "tp8 pp1 ep8", "experts and latent attention split by TP 8"),
        ("telechat2-115b.yaml", 8192, "tp16 pp8", "TP 16 crosses nodes"),
        ("telechat2-115b.yaml", 8192, "tp16 pp8", "8 groups of heads by TP 16"),
        ("telechat2-7b-32k.yaml", 64, "cp8 ulysses", "training has no ulysses"),
        ("telechat2-115b.yaml", 8192, "tp8 pp4 zero3", "zero0 or zero1, not zero3"),
        ("telechat2-115b.yaml", 8192, "tp8 zero1", "zero0 or zero3, not zero1"),
        ("telechat2-115b.yaml", 8192, "tp8 pp32 mbs2", "1f1b needs 32 micro-batches, there are 16"),
        ("telechat2-7b-32k.yaml", 8, "cp8 zero3", "with dp1 there are none"),
    ],
)
def test_an_explanation_says_what_the_search_leaves_out(
    capsys: pytest.CaptureFixture[str], recipe: str, devices: int, layout: str, reason: str
) -> None:
    out = explain(capsys, recipe, layout, devices)
    assert "the search leaves this out: " in out and reason in out
    assert "--set" not in out
    values = json.loads(explain(capsys, recipe, layout, devices, "--json"))
    assert values["overrides"] == [] and any(reason in one for one in values["left_out"])


def test_what_does_not_fit_has_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    out = explain(capsys, "telechat2-115b.yaml", "tp8 pp2 recompute-none", 256)
    assert "DOES NOT FIT: stage 0 is" in out and "--set" not in out and "leaves this out" not in out


def test_states_are_shared_as_training_shares_them(capsys: pytest.CaptureFixture[str]) -> None:
    """FSDP2 without a pipeline is ZeRO 3, under one ZeRO 1, and on one copy nothing."""
    workload = workload_of(load_recipe(LARGE))
    assert [parse_layout(words, workload, 64).zero for words in ("tp8", "tp8 pp4", "tp8 pp8")] == [3, 1, 0]
    assert parse_layout("tp8", workload, 64, trained_here=False).zero == 1
    out = explain(capsys, "telechat2-7b-32k.yaml", "tp1 cp8", 64)
    assert out.startswith("layout dp8 tp1 pp1 cp8 mbs1 zero3 recompute-none ring\n")
    assert "--set parallel.data_parallel_shard=8" in out and "--set parallel.context_method=ring" in out


def test_the_context_method_is_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    method = ("--set", "parallel.context_method=all_gather")
    ring = explain(capsys, "telechat2-7b-32k.yaml", "cp8", 64)
    gathered = explain(capsys, "telechat2-7b-32k.yaml", "cp8", 64, *method)
    assert "recompute-none all_gather\n" in gathered and "parallel.context_method=all_gather" in gathered
    assert "context parallel" in gathered and ring != gathered
    assert explain(capsys, "telechat2-7b-32k.yaml", "cp8 all_gather", 64) == gathered
    words = ("plan", str(ROOT / "telechat2-7b-32k.yaml"), *CHIP, "64", "--json")
    for more, expected in (((), "ring"), (method, "all_gather")):
        found: dict[str, Any] = json.loads(run(capsys, *words, *more)[1])
        apart = [one["layout"].split() for one in found["best"] if " cp" in one["layout"]]
        assert apart and all(expected in layout for layout in apart)


def test_explanations_tell_failures_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "explain", str(LARGE), "tp8 pp16", "--chip", "mlu590", "--devices", "1024")
    assert code == 0 and "assumed: " in out and "useful time" not in out
    cluster = str(ROOT.parent / "clusters" / "ascend-910b-8192.yaml")
    code, out, _ = run(capsys, "plan", "explain", str(LARGE), "tp8 pp8 vpp3", "--cluster", cluster)
    assert code == 0 and "useful time" in out and "failures; lost: " in out
    _, out, _ = run(capsys, "plan", "explain", str(LARGE), "tp8 pp8 vpp3", "--cluster", cluster, "--json")
    assert json.loads(out)["goodput"]["effective"] < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero0 zero2", "zero0 and zero2 contradict"),
        ("ring ulysses", "ring and ulysses contradict"),
        ("tp8 pp4 vpp3 dualpipe_v", "two stages a process, not 3"),
        ("recompute-per-stage", "recomputes all layers alike"),
        ("layers", "layers needs numbers"),
    ],
)
def test_words_that_contradict_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_layout(text, workload_of(load_recipe(LARGE)), 128)


def test_all_of_a_printed_layout_is_read_again() -> None:
    workload = workload_of(load_recipe(ROOT / "moe-1t.yaml"))
    for layout in (
        Layout(dp=16, cp=8, zero=3, context_method="all_gather"),
        Layout(dp=128, ep=64, expert_node=8, zero=3, shard=64),
    ):
        assert parse_layout(str(layout), workload, 128) == layout


def test_a_plan_of_other_software_has_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """The published layout: 86.5 GiB of our own training on 4,096 chips, and no options of ours for other software."""
    words = "tp8 pp8 vpp3 mbs1"
    ours = json.loads(explain(capsys, "telechat2-115b.yaml", words, 4096, "--json"))
    theirs = json.loads(explain(capsys, "telechat2-115b.yaml", words, 4096, "--software", "mindformers", "--json"))
    assert not ours["fits"] and theirs["fits"] and theirs["memory_bytes"] < 60 * 2**30
    assert theirs["overrides"] == []
    lean = json.loads(explain(capsys, "telechat2-115b.yaml", words, 4096, "--software", "mindspeed", "--json"))
    assert lean["memory_bytes"] < theirs["memory_bytes"]  # gradients of two bytes, not of four
    out = explain(capsys, "telechat2-115b.yaml", "tp8 pp4 zero2", 4096, "--software", "megatron")
    assert "leaves this out" not in out and "to train with it" not in out
    code, out, _ = run(capsys, "plan", str(LARGE), *CHIP, "4096", "--software", "mindformers")
    assert code == 0 and "memory of mindformers" in out and "to train with it" not in out


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--software", "paddle"), "Allowed: anychip, megatron-2021"), (("--software", "fsdp", "--save"), "our own")],
)
def test_software_that_is_not_known_or_not_ours(
    capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    code, _, err = run(capsys, "plan", str(LARGE), *CHIP, "4096", *more)
    assert code == 2 and message in err
