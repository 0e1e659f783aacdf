"""The charts of the report, each made from the inputs of one section; None where the section has nothing to show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anychip.report import words
from anychip.report.charts import Bar, Series, bar_chart, line_chart, short, smoothed
from anychip.report.growth import growth_marks
from anychip.report.inputs import Inputs
from anychip.report.words import Fact, duration, number, text

_TOKENS = "tokens 词元"
_STEEP_START = 0.05
_MOST_REASONS = 12


def score(inputs: Inputs) -> dict[str, Any] | None:
    """Bits per byte of the model beside its rivals, best first."""
    evaluation = inputs.evaluation
    if not evaluation or number(evaluation, "model", "bits_per_byte") is None:
        return None
    xz_bytes = number(evaluation, "xz", "primed_with_bytes") or 0.0
    ngram_tokens = number(evaluation, "ngram", "training_tokens") or 0.0
    order = int(number(evaluation, "ngram", "order") or 5)
    candidates = [
        ("This model 本模型", ("model", "bits_per_byte"), "pretrained weights", "bar-main"),
        (f"{order}-gram model", ("ngram", "bits_per_byte"), f"Kneser-Ney, {short(ngram_tokens)} tokens", "bar-plain"),
        ("xz -9e, primed", ("xz", "primed"), f"after {short(xz_bytes)} bytes of training text", "bar-plain"),
        ("xz -9e, cold", ("xz", "cold"), "the held-out text alone", "bar-plain"),
    ]
    bars = [
        Bar(label, value, note, style)
        for label, path, note, style in candidates
        if (value := number(evaluation, *path)) is not None
    ]
    chart = bar_chart(
        sorted(bars, key=lambda bar: bar.value), "bits per byte of held-out text", "bits/byte", "{:.3f}".format
    )
    tokens, size = number(evaluation, "held_out", "tokens"), number(evaluation, "held_out", "utf8_bytes")
    note = f"All of them read the same {short(size or 0)} bytes ({short(tokens or 0)} tokens) of held-out documents."
    digest = text(evaluation, "held_out", "sha256")
    return {"chart": chart, "note": f"{note} SHA-256 of that text: {digest}." if digest else note}


def learning(inputs: Inputs) -> dict[str, Any] | None:
    """Loss (linear and logarithmic tokens), learning rate and gradient norm."""
    metrics = inputs.metrics
    if metrics is None or not metrics.column("loss"):
        return None
    loss = metrics.column("loss")
    series = [
        Series("training", loss, "line-faint"),
        Series("training, smoothed", smoothed(loss), "line-main"),
        Series("validation", metrics.validated("validation_loss"), "line-second", dots=True),
    ]
    legend = [("line-faint", "training 训练"), ("line-main", "training, smoothed 训练（平滑）")]
    if series[2].points:
        legend.append(("line-second", "validation 验证"))
    marks = growth_marks(inputs)
    if marks:
        legend.append(("mark", "growth 增长"))
    late = [_without_start(one, loss[-1][0]) for one in series]
    grown: dict[str, Any] = {"marks": marks, "mark_name": "growth"}
    return {
        "loss": line_chart(late, "loss over tokens", _TOKENS, **grown),
        "loss_log": line_chart(series, "loss over tokens, logarithmic", _TOKENS, x_log=True, **grown),
        "legend": legend,
        "lr": line_chart([Series("learning rate", metrics.column("lr"))], "learning rate", _TOKENS, y_from_zero=True),
        "grad_norm": line_chart(
            [Series("gradient norm", metrics.column("grad_norm"))], "gradient norm", _TOKENS, y_log=True
        ),
    }


def _without_start(series: Series, last: float) -> Series:
    """Without the steep first 5 % of the tokens, which would flatten everything after them."""
    return replace(series, points=[point for point in series.points if point[0] >= _STEEP_START * last])


def speed(inputs: Inputs) -> dict[str, Any] | None:
    """Tokens per second, and the share of the measured peak or, without a peak, TFLOP/s."""
    metrics = inputs.metrics
    if metrics is None or not metrics.column("tokens_per_second"):
        return None
    charts = {
        key: line_chart([Series(title, metrics.column(key))], title, _TOKENS, y_from_zero=True, y_format=shown)
        for key, title, shown in (
            ("tokens_per_second", "tokens per second", short),
            ("mfu", "share of the measured peak", lambda share: f"{share:.0%}"),
            ("tflops", "TFLOP/s", short),
        )
    }
    return {"throughput": charts["tokens_per_second"], "mfu": charts["mfu"], "tflops": charts["tflops"]}


def tuning(inputs: Inputs) -> dict[str, Any] | None:
    """Loss of supervised tuning by step, and what it was tuned on."""
    metrics = inputs.sft_metrics
    if metrics is None or not any("loss" in row for row in metrics.training):
        return None
    points = [(row["step"], row["loss"]) for row in metrics.training if "loss" in row]
    held_out = [(row["step"], row["validation_loss"]) for row in metrics.validation if "validation_loss" in row]
    series = [
        Series("tuning", points, "line-faint"),
        Series("tuning, smoothed", smoothed(points), "line-main"),
        Series("held out", held_out, "line-second", dots=True),
    ]
    facts = [
        Fact("Steps", "步数", f"{metrics.training[-1]['step']:,.0f}"),
        Fact("First loss", "起始损失", f"{points[0][1]:.3f}"),
        Fact("Last loss", "最终损失", f"{series[1].points[-1][1]:.3f}"),
    ]
    if inputs.recipe and inputs.recipe.tune.sft:
        sft = inputs.recipe.tune.sft
        facts.insert(0, Fact("Dialogs from", "对话来源", ", ".join(source.path for source in sft.sources)))
        facts.append(Fact("Dialogs a step", "每步对话数", f"{sft.global_batch_size:,}"))
        facts.append(Fact("Peak learning rate", "最高学习率", f"{sft.optimizer.lr:.1e}"))
    seconds = number(inputs.stages, "sft", "seconds")
    if seconds is not None:
        facts.append(Fact("Time", "用时", duration(seconds)))
    return {"loss": line_chart(series, "tuning loss", "steps 步"), "facts": facts}


def data(inputs: Inputs) -> dict[str, Any] | None:
    """What was read, what was left out and why, and what each source gave."""
    summary = inputs.data
    if summary is None or not isinstance(summary.get("sources"), dict):
        return None
    counts = summary.get("documents")
    dropped = {
        str(reason): count
        for reason in (counts if isinstance(counts, dict) else {})
        if reason not in ("read", "kept") and (count := number(counts, reason))
    }
    most = sorted(dropped, key=lambda reason: -dropped[reason])[:_MOST_REASONS]
    bars = [Bar(reason.replace("_", " "), dropped[reason]) for reason in most]
    return {
        "columns": words.SOURCE_COLUMNS,
        "sources": words.sources(summary),
        "dropped": bar_chart(bars, "documents left out, by reason", "documents", "{:,.0f}".format) if bars else None,
        "facts": words.data_facts(summary, sum(dropped.values())),
    }
