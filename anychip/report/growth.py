"""Growth in the report: what became larger, what proved that the model computed the same, and what the loss did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from anychip.report.charts import short
from anychip.report.inputs import Inputs, Row
from anychip.report.words import Fact, duration, number

PRECISIONS = ("fp64", "fp32", "bf16")


_FIELDS = {
    "hidden_size": ("hidden size", "隐层宽度"),
    "intermediate_size": ("feed-forward size", "前馈宽度"),
    "moe_intermediate_size": ("size of an expert", "专家宽度"),
    "num_attention_heads": ("query heads", "查询头"),
    "num_key_value_heads": ("key-value heads", "键值头"),
    "num_hidden_layers": ("layers", "层数"),
    "vocab_size": ("vocabulary", "词表"),
    "max_position_embeddings": ("context", "上下文长度"),
    "rope_theta": ("rotary base", "旋转位置基数"),
    "rope_scaling": ("rotary scaling", "旋转位置缩放"),
    "yarn": ("YaRN", "YaRN"),
    "family": ("family", "模型系列"),
    "n_routed_experts": ("experts", "专家数"),
    "num_experts_per_tok": ("experts a token", "每词元专家数"),
    "n_shared_experts": ("shared experts", "共享专家数"),
    "first_k_dense_replace": ("dense layers in front", "前部稠密层"),
}


class GrowthRow(NamedTuple):
    """One growth; numbers as text, empty where they are not known. `differences` are by `PRECISIONS`."""

    step: str
    tokens: str
    changes: list[Fact]
    parameters: str
    differences: list[str]
    verdict: dict[str, str]
    before: str
    after: str
    seconds: str


def growth(inputs: Inputs) -> list[GrowthRow]:
    """One row for each growth of the run, in order."""
    return [_row(inputs, record) for record in inputs.growths if number(record, "step") is not None]


def growth_marks(inputs: Inputs) -> list[float]:
    """Tokens at which the model grew."""
    return [tokens for record in inputs.growths if (tokens := number(record, "tokens")) is not None]


def _row(inputs: Inputs, record: Mapping[str, Any]) -> GrowthRow:
    step, seconds = number(record, "step") or 0.0, number(record, "seconds")
    plan, proof = _mapping(record, "growth"), _mapping(record, "proof")
    operators, counts = plan.get("operators"), plan.get("parameters")
    known = isinstance(counts, list) and len(counts) == 2 and all(isinstance(n, int) for n in counts)
    before, after = _held_out(inputs, step)
    return GrowthRow(
        f"{step:,.0f}",
        short(number(record, "tokens") or 0.0),
        [_change(str(operator)) for operator in operators] if isinstance(operators, list) else [],
        " → ".join(f"{count:,}" for count in counts) if known and isinstance(counts, list) else "",
        [_largest(proof, precision) for precision in PRECISIONS],
        _verdict(proof),
        before,
        after,
        duration(seconds) if seconds else "",  # grown by hand: not timed
    )


def _change(operator: str) -> Fact:
    """One line of a growth plan, `hidden_size 192 -> 384`, in words; fields without words keep their name."""
    name, _, change = operator.partition(" ")
    english, chinese = _FIELDS.get(name, (name, ""))
    return Fact(english, chinese, change.replace(" -> ", " → "))


def _held_out(inputs: Inputs, step: float) -> tuple[str, str]:
    """Held-out loss of the old model and of the grown one at this step."""
    metrics = inputs.metrics
    return (_loss_at(metrics.validation, step), _loss_at(metrics.after_growth, step)) if metrics else ("", "")


def _loss_at(rows: Sequence[Row], step: float) -> str:
    found = [row["validation_loss"] for row in rows if row["step"] == step and "validation_loss" in row]
    return f"{found[0]:.6f}" if found else ""


def _largest(proof: Mapping[str, Any], precision: str) -> str:
    """The largest relative difference of the logits that growth itself made."""
    found = [
        difference
        for one in _comparisons(proof)
        if (one.get("of"), one.get("weights"), one.get("precision")) == ("all", "exact", precision)
        and (difference := number(one, "relative")) is not None
    ]
    return f"{max(found):.1e}" if found else ""


def _verdict(proof: Mapping[str, Any]) -> dict[str, str]:
    if proof.get("preserving") is False:
        return {"english": "another function by design", "chinese": "按设计改变函数"}
    if proof.get("passed") is True:
        return {"english": "proved", "chinese": "已证明"}
    return {"english": "not proved", "chinese": "未证明"}


def _comparisons(proof: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    found = proof.get("comparisons")
    for one in found if isinstance(found, list) else []:
        if isinstance(one, Mapping):
            yield one


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}
