"""The README.md of an export: what the model is, how it was made, what was checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from anychip.model.arithmetic import flops_per_token, num_active_parameters, num_parameters
from anychip.recipe.schema import DpoConfig, GrpoConfig, Recipe, SftConfig
from anychip.rundir import RunDirectory

_BEFORE_AFTER = ("before", "after")


def model_card(recipe: Recipe, run: RunDirectory, conversion: dict[str, Any]) -> str:
    """Markdown with YAML front matter. Numbers come from the run; what was not measured is not mentioned."""
    front = {
        "license": recipe.export.license,
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "library_name": "anychip",
        "tags": ["telechat2", "anychip"],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {recipe.name}",
        _model(recipe),
        _use(recipe),
        _training(recipe, run, conversion),
        _evaluation(run),
        _conversion(conversion),
        "## Limits\n\nThis model says what resembles its training text. It has not been aligned or tested for safety; "
        "do not rely on its answers.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _model(recipe: Recipe) -> str:
    model, length = recipe.final_model, recipe.training.seq_length
    active = f", {num_active_parameters(model):,} of them active a token" if model.n_routed_experts else ""
    return (
        f"A decoder of the family {model.family} with {num_parameters(model):,} parameters{active}: "
        f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_attention_heads} query and {model.num_key_value_heads} key/value heads, "
        f"vocabulary {model.vocab_size:,}. Training costs {flops_per_token(model, length).model:,.0f} FLOPs a token at "
        f"{length} tokens (attention halved)."
    )


def _use(recipe: Recipe) -> str:
    model = recipe.final_model
    plain = recipe.export.layout == "llama" or model.family == "llama"
    layout = "Tensor names and `config.json` follow Hugging Face's Llama and Mixtral: no remote code is needed."
    if not plain and model.family.startswith("telechat2"):
        layout = (
            "Tensor names, fused key/value rows and `config.json` follow the published TeleChat2 checkpoints, "
            "so runtimes that read those read this one."
        )
    elif not plain:
        layout = f"Tensor names and `config.json` follow the published checkpoints of the family {model.family}."
    chat = "```bash\nanychip chat PATH_OF_THIS_DIRECTORY\n```\n\n"
    served = not plain or model.biases == "none"  # biases in the layout of Llama are not read back
    return f"## Use\n\n{chat if served else ''}{layout}"


def _training(recipe: Recipe, run: RunDirectory, conversion: dict[str, Any]) -> str:
    training, source = recipe.training, conversion["source"]
    lines = [
        f"- checkpoint: {source['stage']}, step {source['step']}",
        f"- pretraining: {training.steps:,} steps of {training.global_batch_size} x {training.seq_length} tokens, "
        f"{recipe.optimizer.name}, peak rate {recipe.optimizer.lr:g}, seed {recipe.seed}",
    ]
    if recipe.tune.sft and source["stage"] in ("sft", "dpo", "grpo"):
        lines.append(f"- supervised tuning: {_tuning(recipe.tune.sft)}")
    if recipe.tune.dpo and source["stage"] in ("dpo", "grpo"):
        lines.append(f"- preference tuning ({recipe.tune.dpo.loss}): {_tuning(recipe.tune.dpo)}")
    if recipe.tune.grpo and source["stage"] == "grpo":
        lines.append(f"- tuning by rewards: {_tuning(recipe.tune.grpo)}")
    summary = _json(run.data / "summary.json")
    for name, counts in summary.get("sources", {}).items():
        train = counts.get("train", {})
        if train:
            digest = f", SHA-256 of the packed tokens {train['bin_sha256']}" if "bin_sha256" in train else ""
            lines.append(f"- corpus {name}: {train['documents']:,} documents, {train['tokens']:,} tokens{digest}")
    return "## Training\n\n" + "\n".join(lines)


def _tuning(config: SftConfig | DpoConfig | GrpoConfig) -> str:
    paths = ", ".join(source.path for source in config.sources)
    adapters = f", adapters of rank {config.lora.rank} merged in" if config.lora else ""
    return f"{config.steps:,} steps on {paths}{adapters}"


def _evaluation(run: RunDirectory) -> str:
    measured = _json(run.evaluation)
    rows = [
        f"| {name} | {value['bits_per_byte']:.4f} |"
        for name, value in measured.items()
        if isinstance(value, dict) and isinstance(value.get("bits_per_byte"), float)
    ]
    parts = []
    if rows:
        head = "Held-out text, bits per byte (lower is better); the pretrained model.\n\n"
        parts.append(head + "\n".join(["| | bits per byte |", "|---|---|", *rows]))
    if tasks := _task_rows(run):
        head = "| task | metric | value | standard error | documents | run by |\n|---|---|---|---|---|---|\n"
        parts.append(head + "\n".join(tasks))
    if success := _success(run):
        parts.append(success)
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def _task_rows(run: RunDirectory) -> list[str]:
    return [
        f"| {record['task']} | {metric} | {found['value']:.4f} | "
        f"{'' if found['standard_error'] is None else format(found['standard_error'], '.4f')} | "
        f"{record['documents']:,} | {record['runner']} |"
        for record in _json(run.tasks).get("tasks", [])
        for metric, found in record["metrics"].items()
    ]


def _success(run: RunDirectory) -> str:
    """What tuning by rewards did to held-out questions."""
    measured = _json(run.grpo / "success.json")
    if not measured:
        return ""
    shares = [f"{measured[name]['success']:.1%} ± {measured[name]['standard_error']:.1%}" for name in _BEFORE_AFTER]
    return (
        f"Held-out questions with answers that a program checks ({measured['questions']:,}): {shares[0]} right before "
        f"tuning by rewards, {shares[1]} after (likeliest answer; standard errors)."
    )


def _conversion(conversion: dict[str, Any]) -> str:
    check = conversion["logit_check"]
    return (
        "## Conversion check\n\n"
        f"The exported weights ({conversion['dtype']}) were read back and run through {check['against']}: over "
        f"{check['tokens']} tokens the largest logit difference is {check['largest_difference']:.2e} on logits up to "
        f"{check['largest_logit']:.2f}; the likeliest token agrees at {check['same_top_1']:.0%} of positions. "
        "Digests of all files are in `conversion.json`."
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
