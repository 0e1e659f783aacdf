"""The model: its shape, by the names of Hugging Face's `config.json`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anychip.recipe.schema.section import Count, Positive, Section


class RopeScaling(Section):
    """TeleChat2's dynamic NTK: base and attention scale follow the sequence length in steps."""

    base_length: Positive = Field(8192, description="published `base_seqlen`: the length one NTK step covers")
    training_length: Positive = Field(8192, description="published `training_seqlen`: no scaling up to this length")
    cached_keys: Literal["rerotate", "published"] = Field(
        "rerotate",
        description="rerotate: cached keys follow when the base steps up, so every token is scored by the rule of its "
        "own length; published: they keep the old base and tables are rounded to fp16, as the published code does",
    )


class YarnScaling(Section):
    """YaRN (arXiv 2309.00071): low frequencies are stretched by `factor`, high ones stay, and scores are scaled."""

    factor: Annotated[float, Field(ge=1)] = Field(description="how many times longer than the original context")
    original_max_position_embeddings: Positive = Field(description="the original context in tokens")
    beta_fast: Annotated[float, Field(gt=0)] = Field(
        32.0, description="turns within the original context above which a frequency stays"
    )
    beta_slow: Annotated[float, Field(gt=0)] = Field(1.0, description="turns below which it is stretched in full")
    mscale: Annotated[float, Field(ge=0)] = Field(
        0.1, description="queries and keys are scaled by mscale * ln(factor) + 1; TeleChat3 has 0.07"
    )


Family = Literal["telechat2", "telechat2-moe", "telechat3", "telechat3-moe", "teleflm", "llama"]


class ModelConfig(Section):
    """A decoder of the TeleChat families. Shapes follow from these numbers alone."""

    preset: str | None = Field(None, description="a published model to start from, such as telechat2-7b")
    family: Family = Field("telechat2", description="whose layout of published weights and configuration it has")
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    kv_channels: Positive | None = Field(
        None,
        description="width of a head (`head_dim` of config.json); default: hidden_size / num_attention_heads",
    )
    biases: Literal["telechat2", "none"] = Field(
        "telechat2", description="telechat2: on the attention output and the down projections, nowhere else"
    )
    tie_word_embeddings: bool = Field(False, description="the output head is the input embedding")
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    rope_scaling: RopeScaling | None = None
    yarn: YarnScaling | None = None
    max_position_embeddings: Positive = 8192
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of what each attention and MLP adds to hidden states that is dropped in training"
    )
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="0 only: it is not computed")
    # muP (arXiv 2203.03466), by the names of Tele-FLM's config.json
    input_mult: Annotated[float, Field(gt=0)] = Field(1.0, description="muP: embeddings are multiplied by it")
    output_mult: Annotated[float, Field(gt=0)] = Field(
        1.0, description="muP: logits are multiplied by output_mult / mup_scale_factor"
    )
    mup_scale_factor: Annotated[float, Field(gt=0)] = Field(1.0, description="muP: width over that of the base model")
    # Multi-head latent attention (arXiv 2405.04434)
    kv_lora_rank: Count = Field(
        0, description="latent attention: width of what keys and values are made from; 0: plain attention"
    )
    q_lora_rank: Count = Field(0, description="latent attention: width of what queries are made from; 0: the input")
    qk_nope_head_dim: Count = Field(0, description="latent attention: width of a query or key without position")
    qk_rope_head_dim: Count = Field(0, description="latent attention: width with position; all heads share the key's")
    v_head_dim: Count = Field(0, description="latent attention: width of a value")
    # Mixture of experts, by the names of DeepSeek-V3's config.json
    n_routed_experts: Count = Field(0, description="experts that tokens choose from; 0: none")
    num_experts_per_tok: Count = Field(0, description="experts that a token chooses")
    moe_intermediate_size: Count = Field(0, description="inner width of an expert")
    n_shared_experts: Count = Field(0, description="experts that see every token; together they are one wider expert")
    first_k_dense_replace: Count = Field(0, description="first layers that have a plain MLP instead")
    scoring_func: Literal["softmax", "sigmoid"] = Field("softmax", description="from router logits to scores")
    topk_method: Literal["greedy", "noaux_tc"] = Field(
        "greedy", description="noaux_tc: experts are chosen by score plus a bias that balances their load (2408.15664)"
    )
    norm_topk_prob: bool = Field(True, description="the chosen scores are divided by their sum")
    routed_scaling_factor: Annotated[float, Field(gt=0)] = 1.0
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the loss that balances experts within each sequence (2412.19437, eq. 17)"
    )
    router_z_loss_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the loss that keeps router logits small (2202.08906)"
    )
    moe_capacity_factor: Annotated[float, Field(ge=0)] = Field(
        0.0, description="an expert takes this many times its even share of a micro-batch, no more; 0: no limit"
    )
    # Multi-token prediction (arXiv 2412.19437, section 2.2)
    num_nextn_predict_layers: Count = Field(0, description="modules that predict one token further each, in training")
    mtp_loss_scaling_factor: Annotated[float, Field(ge=0)] = Field(
        0.2, description="weight of the mean loss of those modules"
    )

    @property
    def head_dim(self) -> int:
        """Width of a query or a key."""
        if self.latent:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Width of the part of a query or key that turns with position."""
        return self.qk_rope_head_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.v_head_dim if self.latent else self.head_dim

    @property
    def latent(self) -> bool:
        """Whether attention is latent."""
        return self.kv_lora_rank > 0

    @property
    def logit_scale(self) -> float:
        return self.output_mult / self.mup_scale_factor

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts in place of its MLP; modules that predict further tokens
        count on behind the last one."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @model_validator(mode="after")
    def _shapes_divide(self) -> ModelConfig:
        if not self.latent and self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2:
            if self.latent:
                raise ValueError(f"qk_rope_head_dim {self.rotary_dim} must be even for RoPE")
            raise ValueError(f"head_dim {self.head_dim} (hidden_size / num_attention_heads) must be even for RoPE")
        return self

    @model_validator(mode="after")
    def _no_attention_dropout(self) -> ModelConfig:
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout {self.attention_dropout:g}: attention probabilities are never whole in memory, in "
                "a fused kernel nor split over processes, so none can be dropped alike in all layouts; set it to 0 and "
                "use hidden_dropout"
            )
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> ModelConfig:
        if self.rope_scaling is not None and self.yarn is not None:
            raise ValueError("rope_scaling (dynamic NTK) and yarn exclude each other")
        if self.biases != "none" and not self.family.startswith("telechat2"):
            raise ValueError(f"family {self.family} has no biases: set biases to none")
        return self

    @model_validator(mode="after")
    def _latent_attention_is_whole(self) -> ModelConfig:
        widths = {name: getattr(self, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
        if not self.latent:
            if self.q_lora_rank or any(widths.values()):
                raise ValueError("q_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim need kv_lora_rank")
            return self
        if missing := [name for name, width in widths.items() if not width]:
            raise ValueError(f"latent attention (kv_lora_rank {self.kv_lora_rank}) needs {', '.join(missing)}")
        if self.v_head_dim > self.head_dim:
            raise ValueError(f"v_head_dim {self.v_head_dim} is above the width of keys, {self.head_dim}")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("latent attention has as many num_key_value_heads as num_attention_heads")
        if self.rope_scaling is not None:
            raise ValueError("latent attention goes with yarn, not with rope_scaling (dynamic NTK)")
        return self

    @model_validator(mode="after")
    def _experts_are_whole(self) -> ModelConfig:
        if not self.n_routed_experts:
            if self.num_experts_per_tok or self.moe_intermediate_size or self.n_shared_experts:
                raise ValueError(
                    "num_experts_per_tok, moe_intermediate_size and n_shared_experts need n_routed_experts"
                )
            return self
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be 1 to {self.n_routed_experts} "
                "(n_routed_experts)"
            )
        if not self.moe_intermediate_size:
            raise ValueError("experts need moe_intermediate_size")
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} leaves none of {self.num_hidden_layers} layers "
                "with experts"
            )
        return self
