"""Rows of runs.csv: one measured run each, of any framework. What had to be assumed of a row is kept with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from anychip.plan.rows.cells import Cells
from anychip.plan.rows.chips import catalogue_chip
from anychip.plan.rows.run import Incomplete, Run, Software
from anychip.plan.shapes import flops_per_token, num_parameters, work_of
from anychip.plan.types import Experts, LatentAttention, Layout, Workload

RUN_COLUMNS = (
    "id", "source", "date", "framework", "chip", "chip_count", "devices_per_node", "intra_node_link",
    "inter_node_link", "model_name", "params_total", "params_active", "layers", "hidden", "ffn", "heads",
    "kv_heads", "vocab", "gated_mlp", "seq_len", "moe_experts", "moe_topk", "moe_ffn", "shared_experts",
    "global_batch_sequences", "micro_batch", "tp", "pp", "vpp", "dp", "cp", "ep", "zero_stage_or_dist_opt",
    "sequence_parallel", "recompute", "precision", "step_time_s", "tokens_per_s_per_device", "tflops_per_device",
    "mfu", "peak_mem_gb", "flops_convention", "notes",
)  # fmt: skip

# Micro-batch and model chunks of arXiv 2104.04473's Table 1, from the scripts published with it.
_TABLE_1 = {
    "1.7B": (16, 1), "3.6B": (16, 1), "7.5B": (16, 1), "18.4B": (8, 1), "39.1B": (4, 1), "76.1B": (2, 3),
    "145.6B": (2, 2), "310.1B": (1, 2), "529.6B": (1, 3), "1008.0B": (1, 1),
}  # fmt: skip
_VOCABULARIES = (
    ("aquila", 100_008), ("baichuan2", 125_696), ("baichuan", 64_000), ("bloom", 250_880), ("qwen", 151_936),
    ("chatglm3", 65_024), ("glm3", 65_024), ("glm4", 151_552), ("yi", 64_000), ("llama3", 128_256),
    ("llama-3", 128_256), ("llama", 32_000), ("mixtral", 32_000), ("mistral", 32_000), ("gemma", 256_000),
    ("deepseek", 102_400), ("telechat", 131_072), ("minicpm", 122_753), ("internlm2", 92_544), ("gpt", 51_200),
)  # fmt: skip
_HEAD_DIMS = (("gemma", 256), ("qwen3_30b", 128), ("qwen3_235b", 128), ("qwen3-30b", 128), ("gpt_oss", 64))
_UNGATED = ("gpt", "bloom", "mpt", "megatron", "meg", "ds3d", "opt")


def published_run(row: dict[str, str], number: int) -> Run:
    """One row of runs.csv. Raises Incomplete with what it does not say."""
    text = Cells(row, number)
    text.refuse()
    workload, assumed = _workload(text)
    layout = _layout(text, workload, assumed)
    devices = text.integer("chip_count") or layout.devices
    if layout.devices != devices:
        raise Incomplete(f"its degrees multiply to {layout.devices}, not to chip_count {devices}")
    software = _software(text)
    seconds = _step_seconds(text, workload, devices)
    memory = text.number("peak_mem_gb")
    if seconds is None and memory is None:
        raise Incomplete("prints neither a time nor a memory")
    if "--swap-" in text.notes or "-tune_" in text.cell("id"):
        memory = None  # tensors go to the host, or sequences vary in length
    if seconds is None and memory is None:
        raise Incomplete("its memory is that of swapped tensors or of sequences of varying length")
    used = "nvidia-smi" in text.notes
    chip, plain = catalogue_chip(text.cell("chip"), text.notes)
    if not plain:
        assumed.append(f"chip {text.cell('chip')} is {chip}")
    return Run(
        id=text.cell("id") or f"row-{number}",
        source=text.cell("source"),
        publisher=_publisher(text),
        model=_model(text, workload),
        software=software,
        chip=chip,
        named_chip="unspecified" not in text.cell("chip"),
        devices=devices,
        devices_per_node=text.integer("devices_per_node"),
        inter_node_gbit_per_s=_network_speed(text),
        network="omni-path" if "omni-path" in text.cell("inter_node_link").lower() else "",
        workload=workload,
        layout=layout,
        seconds=seconds,
        memory_bytes=None if memory is None else memory * (1e9 if used else 2**30),
        memory_kind="used" if used else "allocated",
        group=f"{_publisher(text)} {workload.name} {workload.hidden} {workload.layers} {workload.heads} "
        f"{workload.seq_length} {devices} {workload.global_batch}",
        facts=tuple(_facts(text)),
        assumed=tuple(assumed),
    )


def _facts(text: Cells) -> Iterator[tuple[str, float]]:
    """What a row says of its software beyond the software's habits."""
    if "bf16-optimizer" in text.cell("zero_stage_or_dist_opt"):
        yield "gradient_bytes", 6.0  # fp32 accumulation beside the bf16 gradient, as its notes say
    if text.note(r"--position-embedding-type (alibi)"):
        yield "fused_attention", False  # a bias on every score


def _workload(text: Cells) -> tuple[Workload, list[str]]:
    assumed: list[str] = []
    layers, hidden, heads = text.needed("layers"), text.needed("hidden"), text.needed("heads")
    seq = text.integer("seq_len") or int(text.note(r"max_target_length \(inferred (\d+)\)") or 0)
    if not seq:
        raise Incomplete("seq_len is not printed")
    batch = text.integer("global_batch_sequences") or _noted_batch(text)
    if not batch:
        raise Incomplete("the global batch is not printed")
    gated = _gated(text, assumed)
    ffn = text.integer("ffn") or _derived_ffn(text, hidden, gated, assumed)
    vocab = text.integer("vocab") or _vocabulary(text, assumed)
    head_dim = int(text.note(r"--kv-channels (\d+)") or 0) or next(
        (width for name, width in _HEAD_DIMS if name in text.name), hidden // heads
    )
    if skipped := text.note(r"--noop-layers ([\d,]+)"):
        layers -= len(skipped.split(","))
    experts = _experts(text, ffn)
    tied = not gated if not text.note(r"(untie-embeddings)") else False
    if text.note(r"(--position-embedding-type)"):
        tied = text.note(r"(untie-embeddings)") is None
    return (
        Workload(
            name=text.cell("model_name") or text.cell("id"),
            layers=layers,
            hidden=hidden,
            ffn=ffn,
            heads=heads,
            kv_heads=text.integer("kv_heads") or heads,
            head_dim=head_dim,
            vocab=vocab,
            seq_length=seq,
            global_batch=batch,
            dtype=_precision(text),
            gated=gated,
            biases="none" if gated else "all",
            norm="rms" if gated else "layer",
            tied_embeddings=tied,
            learned_positions=0 if gated or "rope" in text.notes or "alibi" in text.notes else seq,
            window=int(text.note(r"--sliding-window (\d+)") or 0),
            latent=_latent(text),
            experts=experts,
            predicted_tokens=int(text.note(r"--mtp-num-layers (\d+)") or 0),
        ),
        assumed,
    )


def _noted_batch(text: Cells) -> int:
    for pattern in (r"global_batch_sequences=(\d+)", r"inferred gbs=(\d+)", r"inferred gbs = [^=;]*= (\d+)"):
        if found := text.note(pattern):
            return int(found)
    return 0


def _precision(text: Cells) -> Any:
    printed = text.cell("precision").lower()
    if "fp4" in printed:
        raise Incomplete("4-bit products, whose peak the catalogue does not hold")
    if "fp8" in printed:
        return "fp8"
    if not printed or "bf16" in printed or "bfloat16" in printed or printed in ("amp", "mixed"):
        return "bf16"
    if "fp16" in printed or "float16" in printed or printed == "half":
        return "fp16"
    raise text.unreadable("precision", "is none of bf16, fp16 and fp8")


def _gated(text: Cells, assumed: list[str]) -> bool:
    printed = text.truth("gated_mlp")
    if printed is not None and "gemma" not in text.name:  # scripts say geglu, not swiglu
        return printed
    name = text.cell("model_name").lower() + text.cell("source").lower() + text.name
    gated = not any(word in name for word in ("gpt2", "gpt3", "gpt-", "bloom", "megatron", "bigscience", "arxiv 2104"))
    assumed.append(f"{'gated' if gated else 'plain'} feed-forward")
    return gated


def _derived_ffn(text: Cells, hidden: int, gated: bool, assumed: list[str]) -> int:
    """Llama's rule when the source derives it in code, otherwise 4 hidden."""
    if text.integer("moe_ffn") and text.integer("moe_experts"):
        return text.needed("moe_ffn")
    if not gated:
        return 4 * hidden
    multiple = int(text.note(r"multiple_of=(\d+)") or 256)
    width = int(8 * hidden / 3)
    factor = text.note(r"ffn_dim_multiplier=([\d.]+)")
    if factor:
        width = int(float(factor) * width)
        multiple = 4096 if multiple == 256 else multiple
    assumed.append(f"ffn by Llama's rule, multiples of {multiple}")
    return -(-width // multiple) * multiple


def _vocabulary(text: Cells, assumed: list[str]) -> int:
    if noted := text.note(r"vocab[^;]*inferred (\d+)"):
        return int(noted)
    for name, size in _VOCABULARIES:
        if name in text.name:
            assumed.append(f"vocabulary {size} by the model's name")
            return size
    assumed.append("vocabulary 51200")
    return 51_200


def _experts(text: Cells, ffn: int) -> Experts | None:
    count = text.integer("moe_experts")
    if not count:
        return None
    width = text.integer("moe_ffn") or ffn
    top_k = text.integer("moe_topk") or 1
    shared = text.integer("shared_experts") or 0
    dense = int(text.note(r"--first-k-dense-replace (\d+)") or text.note(r"(\d+) dense layer") or 0)
    if not dense and "deepseekv3" in text.name and text.needed("layers") > 8:
        dense = 3
    return Experts(count=count, top_k=top_k, ffn=width, shared_ffn=shared * width, dense_layers=dense)


def _latent(text: Cells) -> LatentAttention | None:
    if not (
        "MLA" in text.notes or "kv-lora-rank" in text.notes or re.search(r"deepseek[-_]?v?[23]|dsv[23]", text.name)
    ):
        return None
    if "deepseek_500b" in text.name or "minimax" in text.name:
        return None
    q_rank = int(
        text.note(r"q_lora (\d+)") or text.note(r"--q-lora-rank (\d+)") or (0 if "lite" in text.name else 1536)
    )
    return LatentAttention(
        q_rank=q_rank,
        kv_rank=int(text.note(r"kv_lora (\d+)") or text.note(r"--kv-lora-rank (\d+)") or 512),
        nope_dim=int(text.note(r"qk_nope (\d+)") or 128),
        rope_dim=int(text.note(r"qk_rope (\d+)") or 64),
        value_dim=int(text.note(r" v (\d+)\)") or text.note(r"--v-head-dim (\d+)") or 128),
    )


def _layout(text: Cells, workload: Workload, assumed: list[str]) -> Layout:
    tp = text.integer("tp") or int(text.note(r"inferred: tp=(\d+)") or 0)
    pp = text.integer("pp") or int(text.note(r"pp=(\d+)") or 0)
    if not tp or not pp:
        raise Incomplete("tp and pp are not printed")
    devices = text.integer("chip_count") or 0
    cp = text.integer("cp") or 1
    dp = text.integer("dp") or max(1, devices // (tp * pp * cp))
    micro, vpp = text.integer("micro_batch"), text.integer("vpp") or 1
    table_1 = re.match(r"mlm-sc21-t1-(.*)", text.cell("id"))
    if table_1 and table_1.group(1) in _TABLE_1:
        micro, vpp = _TABLE_1[table_1.group(1)]
        assumed.append("micro-batch and chunks from the scripts published with the paper")
    if micro is None and pp == 1 and "mlm-2020" in text.cell("id"):
        micro = workload.global_batch // dp
        assumed.append("one micro-batch a step")
    if micro is None:
        raise Incomplete("micro_batch is not printed")
    if workload.global_batch % (dp * micro):
        if workload.global_batch < dp * micro:
            raise Incomplete(f"global batch {workload.global_batch} is below dp x micro_batch = {dp * micro}")
        assumed.append("global batch rounded to whole micro-batches")
    if vpp > 1 and vpp * pp > workload.layers:
        vpp = max(1, workload.layers // pp)
        assumed.append(f"vpp {vpp}: the printed one counts layers a chunk")
    zero, shard = _zero(text, dp, cp)
    recompute, deep = _recompute(text, assumed)
    listed = text.note(r"--num-layer-list ([\d,]+)")
    stages = tuple(int(count) for count in listed.split(",")) if listed else ()
    if stages and (sum(stages) != workload.layers or len(stages) != pp):
        stages = ()
    method: Any = "ulysses" if re.search("ulysses|a2a|hybrid_cp", text.notes) else "ring"
    printed_sp = text.truth("sequence_parallel")
    modern = _software(text) not in ("megatron-2021", "deepspeed", "fsdp", "jax")
    ep = min(text.integer("ep") or 1, dp * cp * tp)
    return Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=ep,
        expert_tp=1 if _software(text) == "megatron" else tp,
        zero=zero,
        shard=shard,
        sequence_parallel=tp > 1 and (modern if printed_sp is None else printed_sp),
        micro_batch=micro,
        recompute=recompute,
        recompute_layers=deep,
        schedule="interleaved" if vpp > 1 else "1f1b",
        context_method=method,
        overlap_tensor=_overlaps_tensor(text),
        overlap_data=_overlaps_data(text),
        stage_layers=stages,
    )


def _overlaps_tensor(text: Cells) -> bool:
    software = _software(text)
    if software == "mindspeed":
        return bool(text.note(r"--use-(?:ascend-)?(mc2)"))
    if software == "mindformers":
        return bool(text.note(r"(fine_grain_interleave|micro_batch_interleave_num)"))
    return software == "megatron" and "no TP/DP comm overlap" not in text.notes


def _overlaps_data(text: Cells) -> bool:
    software = _software(text)
    if software == "mindspeed":
        return "--overlap-grad-reduce" in text.notes
    return software not in ("megatron-2021", "deepspeed") and "no TP/DP comm overlap" not in text.notes


def _zero(text: Cells, dp: int, cp: int) -> tuple[int, int]:
    printed = text.cell("zero_stage_or_dist_opt").lower()
    if "zero3" in printed or ("fsdp" in printed and "zero2" not in printed):
        pod = int(re.search(r"ici (\d+)", printed).group(1)) if "ici" in printed else 0  # type: ignore[union-attr]
        return 3, pod if pod and pod < dp * cp else 0
    if "zero2" in printed:
        return 2, 0
    if "zero1" in printed or "dist_opt" in printed:
        return 1, 0
    if printed in ("", "ddp") and _software(text) == "megatron":
        return 1, 0
    return 0, 0


def _recompute(text: Cells, assumed: list[str]) -> tuple[Any, int]:
    """Kind, and for block recompute the number of layers a chunk."""
    printed = text.cell("recompute").lower()
    flags = text.note(r"recompute flags: ([^;]*)") or ""
    blocks = re.search(r"recompute-method=block recompute-num-layers=(\d+)", flags)
    if printed not in ("", "none", "selective", "full"):
        raise text.unreadable("recompute", "is none of none, selective and full")
    if printed:
        return printed, int(blocks.group(1)) if blocks and printed == "full" else 0
    if "mlm-2020" in text.cell("id") or "inferred: full recompute" in text.notes:
        return "full", 0
    assumed.append("no recomputation (not printed)")
    return "none", 0


def _software(text: Cells) -> Software:
    framework = text.cell("framework").lower()
    if framework in ("deepspeed", "pytorch", "mindspore") and "zero3" in text.cell("zero_stage_or_dist_opt").lower():
        return "deepspeed"  # parameters gathered by every micro-batch, nothing beside it
    for words, software in (
        (("mindspeed",), "mindspeed"),
        (("mindformers", "mindspore"), "mindformers"),
        (("maxtext", "pathways", "t5x", "jax"), "jax"),
        (("foundry", "fsdp"), "fsdp"),
        (("zero-3",), "deepspeed"),
        (("megatron-deepspeed",), "megatron-2021"),
    ):
        if any(word in framework for word in words):
            return software  # type: ignore[return-value]
    if framework == "megatron-lm" and not text.cell("source").lower().startswith("github moore"):
        return "megatron-2021"
    return "megatron"


def _step_seconds(text: Cells, workload: Workload, devices: int) -> float | None:
    """Step time from whatever the source prints, by its own convention of counting FLOPs."""
    if seconds := text.number("step_time_s"):
        return seconds
    tokens = workload.tokens
    if rate := text.number("tokens_per_s_per_device"):
        return tokens / (rate * devices)
    convention = text.cell("flops_convention").lower()
    w = work_of(workload)
    if achieved := text.number("tflops_per_device"):
        if "hardware" in convention:
            if noted := text.note(r"step_time_s=([\d.]+)"):
                return float(noted)
            return _megatron_hardware_flops(workload) / (achieved * 1e12 * devices)
        halve = "halved" in convention and "not causal-halved" not in convention and "probably full" not in convention
        return float(flops_per_token(w, halve_attention=halve)) * tokens / (achieved * 1e12 * devices)
    if utilisation := text.number("mfu"):
        if utilisation > 1:
            raise text.unreadable("mfu", "is above 1")
        if "mindspeed" in convention:
            per_token = 6 * (num_parameters(workload) - workload.vocab * workload.hidden)
            per_token += 12 * workload.layers * workload.hidden * workload.seq_length
            return per_token * tokens / (utilisation * 353.6e12 * devices)
        raise Incomplete("prints MFU alone, against a peak it does not name")
    if text.cell("id").startswith("telechat") and (samples := text.note(r"([\d.]+) samples/s")):
        return workload.global_batch / float(samples)
    return None


def _megatron_hardware_flops(workload: Workload) -> float:
    """arXiv 2104.04473, equation 3: forward, backward and full recomputation, attention counted in full."""
    b, s, layers, h = workload.global_batch, workload.seq_length, workload.layers, workload.hidden
    return 96.0 * b * s * layers * h**2 * (1 + s / (6 * h) + workload.vocab / (16 * layers * h))


def _network_speed(text: Cells) -> float | None:
    """Gbit/s a device from texts such as `8x200Gb/s HDR InfiniBand per node`."""
    link, per_node = text.cell("inter_node_link"), text.integer("devices_per_node") or 8
    if found := re.search(r"(?:(\d+)x)?(\d+)\s*Gb/s", link):
        return int(found.group(1) or 1) * float(found.group(2)) / per_node
    return None


def _publisher(text: Cells) -> str:
    """The measuring party and publication, without commit, file and section."""
    words = text.cell("source").replace("github ", "")
    return re.split(r"[ :\[]", words, maxsplit=1)[0] if not words.startswith("arXiv") else " ".join(words.split()[:2])


def _model(text: Cells, workload: Workload) -> str:
    """Shape, not name: renamed copies and re-runs of one model are left out together."""
    return f"h{workload.hidden}-f{workload.ffn}-l{workload.layers}"
