"""The words and numbers of the report: summary, tiles, tables. Plain data; the page's template does the markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from anychip.model.arithmetic import flops_per_token, kv_cache_bytes_per_token, num_active_parameters, num_parameters
from anychip.recipe.schema import ModelConfig
from anychip.report.charts import short
from anychip.report.inputs import Inputs, finite

_STAGE_NAMES = {
    "data": ("data", "数据"),
    "train": ("pretraining", "预训练"),
    "sft": ("tuning", "微调"),
    "dpo": ("preference tuning", "偏好微调"),
    "grpo": ("tuning by rewards", "奖励微调"),
    "eval": ("evaluation", "评测"),
    "tasks": ("tasks", "任务评测"),
    "export": ("export", "导出"),
    "report": ("report", "报告"),
    "samples": ("samples", "样例"),
}


class Fact(NamedTuple):
    """One row of a table."""

    english: str
    chinese: str
    value: str


class Tile(NamedTuple):
    """One of the large numbers at the top."""

    english: str
    chinese: str
    value: str
    unit: str = ""


def number(tree: object, *path: str) -> float | None:
    """The finite number at this path of nested mappings, or None."""
    return finite(_at(tree, path))


def text(tree: object, *path: str) -> str:
    """The text at this path of nested mappings, or nothing."""
    found = _at(tree, path)
    return found if isinstance(found, str) else ""


def duration(seconds: float) -> str:
    """42 s, 4 m 05 s, 3 h 20 m, 2 d 04 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def summary(inputs: Inputs) -> dict[str, str]:
    """One sentence about what was trained, in both languages."""
    recipe = inputs.recipe
    if recipe is None:
        return {"english": "The recipe of this run is not readable.", "chinese": "本次运行的配方无法读取。"}
    parameters = short(num_parameters(recipe.final_model))
    sources = ", ".join(source.path for source in recipe.data.sources[:4])
    tokens = _tokens_trained(inputs)
    after = f" on {short(tokens)} tokens" if tokens else ""
    tuned = ", then tuned to answer questions" if inputs.sft_metrics else ""
    return {
        "english": f"A model of the TeleChat2 architecture with {parameters} parameters, trained from random weights"
        f"{after} of {sources}{tuned}.",
        "chinese": f"TeleChat2 架构，{parameters} 参数，从随机初始化开始"
        + (f"用 {short(tokens)} 词元" if tokens else "")
        + f"训练，语料为 {sources}"
        + ("，随后经问答监督微调。" if inputs.sft_metrics else "。"),
    }


def tiles(inputs: Inputs) -> list[Tile]:
    """The numbers a person wants first; those that are not known are left out."""
    found: list[Tile] = []
    if inputs.recipe:
        found.append(Tile("parameters", "参数量", short(num_parameters(inputs.recipe.final_model))))
    if tokens := _tokens_trained(inputs):
        found.append(Tile("tokens trained on", "训练词元", short(tokens)))
    model_bits, rival = number(inputs.evaluation, "model", "bits_per_byte"), number(inputs.evaluation, "xz", "primed")
    if model_bits is not None:
        found.append(Tile("on held-out text", "留出文本", f"{model_bits:.3f}", "bits/byte"))
        if rival:
            change = model_bits / rival - 1
            found.append(Tile("bytes against xz -9e, primed", "相比 xz -9e", f"{change:+.0%}".replace("-", "−")))
    rows = inputs.metrics.training if inputs.metrics else []
    if rates := sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row):
        found.append(Tile("training speed, median", "训练速度（中位数）", short(rates[len(rates) // 2]), "tok/s"))
    if shares := sorted(row["mfu"] for row in rows if "mfu" in row):
        found.append(Tile("of the measured matrix peak", "实测算力利用率", f"{shares[len(shares) // 2]:.0%}"))
    if memory := max((row["memory_bytes"] for row in rows if "memory_bytes" in row), default=0.0):
        value, unit = size(memory).split(" ")
        found.append(Tile("peak memory", "内存峰值", value, unit))
    if seconds := sum(number(record, "seconds") or 0.0 for record in inputs.stages.values()):
        found.append(Tile("from corpus to report", "总用时", duration(seconds)))
    return found


def answers(inputs: Inputs) -> list[dict[str, Any]]:
    """Sample answers with the documentation's sentence and what the model had seen of the question."""
    samples = (inputs.samples or {}).get("samples")
    shown = []
    for sample in samples if isinstance(samples, list) else []:
        if not isinstance(sample, Mapping) or not isinstance(sample.get("question"), str):
            continue
        shown.append(
            {
                "question": sample["question"],
                "answer": str(sample.get("answer") or ""),
                "reference": str(sample.get("reference") or ""),
                "badges": _badges(sample),
            }
        )
    return shown


def sampling(inputs: Inputs) -> str:
    """How the sample answers were drawn."""
    how = (inputs.samples or {}).get("sampling")
    if not isinstance(how, Mapping):
        return ""
    temperature = number(how, "temperature")
    parts = ["likeliest token each time" if temperature == 0 else f"temperature {temperature:g}" if temperature else ""]
    if (penalty := number(how, "repetition_penalty")) not in (None, 1.0):
        parts.append(f"repetition penalty {penalty:g}")
    if seed := number(inputs.samples, "seed"):
        parts.append(f"seed {seed:.0f}")
    return f"Sampling 采样: {', '.join(part for part in parts if part)}." if any(parts) else ""


def stages(inputs: Inputs) -> list[dict[str, Any]]:
    """Time of each stage; `weight` is its share of the strip."""
    order = list(_STAGE_NAMES)
    timed = [(name, number(record, "seconds") or 0.0) for name, record in inputs.stages.items()]
    timed.sort(key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    total = sum(seconds for _, seconds in timed)
    return [
        {
            "english": _STAGE_NAMES.get(name, (name, ""))[0],
            "chinese": _STAGE_NAMES.get(name, (name, ""))[1],
            "time": duration(seconds),
            "weight": f"{100 * seconds / total:.2f}",
        }
        for name, seconds in timed
        if seconds > 0
    ]


def model(inputs: Inputs) -> list[Fact]:
    """The model card's numbers, from the configuration alone."""
    recipe = inputs.recipe
    if recipe is None:
        return []
    config, length = recipe.final_model, recipe.training.seq_length
    flops = flops_per_token(config, length)
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    return [
        Fact("Architecture", "架构", _architecture(config)),
        Fact("Parameters", "参数量", _parameters(config)),
        Fact("Layers × hidden size", "层数 × 隐层宽度", f"{config.num_hidden_layers} × {config.hidden_size}"),
        Fact("Feed-forward size", "前馈宽度", f"{config.intermediate_size:,}"),
        Fact("Heads, query / key-value", "注意力头（查询 / 键值）", f"{queries} / {keys}, {config.head_dim} wide"),
        Fact("Vocabulary", "词表", f"{config.vocab_size:,} pieces"),
        Fact("Training length", "训练长度", f"{length:,} tokens"),
        Fact("FLOPs a token, forward and backward", "每词元计算量（前向 + 反向）", _flops(flops.model, flops.full)),
        Fact("Key-value cache a token, bf16", "每词元 KV 缓存", size(kv_cache_bytes_per_token(config))),
        Fact("Seed", "随机种子", f"{recipe.seed}"),
    ]


def _architecture(config: ModelConfig) -> str:
    attention = "latent attention" if config.latent else "grouped-query attention"
    head = "tied head" if config.tie_word_embeddings else "untied head"
    name = "TeleChat2" if config.family == "telechat2" else config.family
    inner = "SwiGLU"
    if config.n_routed_experts:
        inner = f"{config.n_routed_experts} experts, {config.num_experts_per_tok} a token"
    return f"{name}: RMSNorm, rotary positions, {attention}, {inner}, {head}"


def _parameters(config: ModelConfig) -> str:
    total = f"{num_parameters(config):,}"
    return f"{total}, {num_active_parameters(config):,} active a token" if config.n_routed_experts else total


SOURCE_COLUMNS = (
    {"english": "documents, training", "chinese": "训练文档"},
    {"english": "tokens, training", "chinese": "训练词元"},
    {"english": "text, training", "chinese": "训练文本"},
    {"english": "documents, held out", "chinese": "留出文档"},
    {"english": "tokens, held out", "chinese": "留出词元"},
)


def sources(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a source for the columns above; a corpus packed elsewhere has its totals only."""
    rows = []
    for name, held in summary["sources"].items():
        training = held.get("train", held) if isinstance(held, Mapping) else None
        found = [number(training, key) for key in ("documents", "tokens", "text_bytes")]
        found += [number(held, "validation", key) for key in ("documents", "tokens")]
        shown = [
            "" if value is None else size(value) if place == 2 else f"{value:,.0f}" for place, value in enumerate(found)
        ]
        rows.append({"name": str(name), "values": shown})
    return rows


def data_facts(summary: Mapping[str, Any], dropped: float) -> list[Fact]:
    """Totals and digests."""
    facts = []
    if (read := number(summary, "documents", "read")) is not None:
        facts.append(Fact("Documents read", "读入文档", f"{read:,.0f}"))
        facts.append(Fact("Left out", "剔除", f"{dropped:,.0f}"))
    if (kept := number(summary, "documents", "kept")) is not None:
        facts.append(Fact("Kept", "保留", f"{kept:,.0f}"))
    tokens = _total(summary, "tokens")
    if tokens and (text_bytes := _total(summary, "text_bytes")):
        facts.append(Fact("Bytes a token", "每词元字节数", f"{text_bytes / tokens:.2f}"))
    if (pieces := number(summary, "tokenizer", "vocab_size")) is not None:
        facts.append(Fact("Tokenizer", "分词器", f"{pieces:,.0f} pieces"))
    if digest := text(summary, "tokenizer", "digest"):
        facts.append(Fact("SHA-256 of the tokenizer", "摘要", digest))
    for name, held in summary["sources"].items():
        if digest := text(held, "train", "bin_sha256"):
            facts.append(Fact(f"SHA-256 of {name}", "摘要", digest))
    return facts


def _total(summary: Mapping[str, Any], name: str) -> float:
    return sum(number(held, "train", name) or 0.0 for held in summary["sources"].values())


def _flops(model_flops: float, full: float) -> str:
    return f"{model_flops / 1e9:.4g} GFLOP with causal attention halved, {full / 1e9:.4g} GFLOP with the full square"


def _tokens_trained(inputs: Inputs) -> float | None:
    rows = inputs.metrics.training if inputs.metrics else []
    return next((row["tokens"] for row in reversed(rows) if "tokens" in row), None)


def _at(tree: object, path: Sequence[str]) -> Any:
    node: Any = tree
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _badges(sample: Mapping[str, Any]) -> list[str]:
    known = {
        "trained": "seen in tuning 微调中见过",
        "held_out_phrasing": "new wording of a seen subject 换了问法",
        "held_out_subject": "subject never tuned on 微调中没见过",
        "own": "asked by the recipe 配方中的提问",
    }
    badge = known.get(str(sample.get("novelty")))
    return [badge] if badge else []
