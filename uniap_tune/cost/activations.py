"""Bytes that a transformer block keeps for its backward pass, tensor by tensor.

With 16-bit linear layers this is the 34 sbh + 5 a s^2 b of arXiv 2205.05198 for a GPT block. With 8- and 4-bit ones the
narrow copy that backward reads is kept instead of a linear layer's input, unless another layer keeps that input anyway.
What each module keeps, and what its recomputation frees, follows megatron-core 0.16 (transformer_config.py,
``recompute_modules``; multi_latent_attention.py; moe/experts.py) and TransformerEngine.

Symbols: t = b * s / cp tokens of the rank; u = 2 t h / sp bytes, one hidden-width tensor at a layer's border.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniap_tune.cost import eager
from uniap_tune.cost.allocator import Allocation
from uniap_tune.cost.operators import fuses_softmax, head_widths
from uniap_tune.cost.runtime import (
    CORE_ATTENTION,
    EXPERT_ACTIVATION,
    EXPERTS,
    LATENT_UP,
    MLP,
    NORMS,
    SHARED_EXPERTS,
    Runtime,
)
from uniap_tune.graph import LayerType
from uniap_tune.spec import DType, Job, Model, Moe, QkNorm
from uniap_tune.strategy import Strategy

# Bytes of a kept input element with its scales: MXFP8 has one scale byte for 32 elements, NVFP4 one for 16.
NARROW_BYTES = {DType.FP8: 1.0, DType.MXFP8: 1 + 1 / 32, DType.NVFP4: 0.5 + 1 / 16}


# What recomputing a module frees (transformer_config.py, ``recompute_modules``); those in NORMS only where they are
# layers of their own.
_RECOMPUTED = {
    CORE_ATTENTION: ("scores",),
    NORMS: ("qkv_input", "mlp_normed"),
    LATENT_UP: ("latent_normed", "heads"),
    MLP: ("mlp_normed", "mlp_inner"),
    EXPERTS: ("expert_input", "expert_inner", "activated", "router", "shared"),
    EXPERT_ACTIVATION: ("activated",),
    SHARED_EXPERTS: ("shared",),
}
# What offloading a module moves to the host (transformer_config.py, ``offload_modules``).
_OFFLOADED = {
    "attn_norm": ("attention_input",),
    "qkv_linear": ("qkv_input",),
    "core_attn": ("heads", "scores"),
    "attn_proj": ("context",),
    "mlp_norm": ("mlp_input",),
    "expert_fc1": ("expert_input",),
    "moe_act": ("expert_inner", "activated"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """Bytes of one micro-batch's tensors in a block.

    Attributes:
        attention_input: input of the first norm.
        qkv_input: its output, which the first linear layers of attention read.
        latents: those of latent attention, as their norms read them.
        latent_normed: the same after the norms.
        heads: queries, keys and values.
        scores: what the attention core keeps beyond them.
        context: its output.
        mlp_input: input of the second norm.
        mlp_normed: its output.
        mlp_inner: input and output of a dense MLP's activation function.
        expert_input: routed tokens as experts read them.
        expert_inner: input of their activation function.
        activated: its output.
        router: logits, probabilities and maps.
        shared: of shared experts.
        further: inputs of further norms, dropout masks, cross-attention.
        fused_norms: norms whose output exists only inside the linear layer that reads it, by its name above.
        latent: attention projects latents up.
        dense: the MLP is not one of experts.
    """

    attention_input: float
    qkv_input: float
    latents: float
    latent_normed: float
    heads: float
    scores: float
    context: float
    mlp_input: float
    mlp_normed: float
    mlp_inner: float
    expert_input: float
    expert_inner: float
    activated: float
    router: float
    shared: float
    further: float
    fused_norms: frozenset[str]
    latent: bool
    dense: bool

    @property
    def whole(self) -> float:
        """All of them."""
        return sum(self._bytes(name) for name in self.__slots__ if name not in ("fused_norms", "latent", "dense"))

    def freed(self, recomputed: frozenset[str], offloaded: frozenset[str] = frozenset()) -> float:
        """Bytes that recomputing some modules and offloading others frees."""
        names: set[str] = set()
        for module in recomputed:
            if (module == LATENT_UP and not self.latent) or (module == MLP and not self.dense):
                continue
            names.update(_RECOMPUTED.get(module, ()))
            if module == NORMS:
                names -= self.fused_norms
        for module in offloaded:
            names.update(_OFFLOADED.get(module, ()))
        return sum(self._bytes(name) for name in sorted(names))

    def _bytes(self, name: str) -> float:
        return float(getattr(self, name))


class ActivationModel:
    """Counts the tensors of blocks of one job.

    Args:
        model: what is trained.
        job: how.
        runtime: how the engine executes; TransformerEngine's norms of queries and keys copy them out of what the
            projection wrote.
        attention_copies: fused attention keeps a copy of its output in the order of the layer.
    """

    def __init__(self, model: Model, job: Job, runtime: Runtime, *, attention_copies: bool) -> None:
        self._model = model
        self._job = job
        self._width = float(job.precision.param_bytes)
        self._input = NARROW_BYTES.get(job.precision.compute, self._width)
        self._attention_copies = attention_copies
        self._runtime = runtime
        self.norm_input = eager.norm_input(model, self._width) if runtime.eager else 1.0
        self._norm_tensors = 2.0 if runtime.transformer_engine else self.norm_input

    def block(self, layer: LayerType, strategy: Strategy, samples: int) -> Tensors:
        """The tensors of one block for one micro-batch on one rank."""
        model = self._model
        tokens = samples * self._job.sequence(encoder=layer.encoder) / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        border = self._width * tokens * model.hidden_size / sp
        normed = border * self._input / self._width  # as the linear layer that follows a norm reads it
        further = self.norm_input * border * max(0, model.norms_per_layer - 2)
        if model.hidden_dropout:
            further += (3 if layer.cross else 2) * tokens * model.hidden_size / sp  # masks of a byte an element
        if layer.cross:
            queries, pairs = self._cross(tokens, strategy, samples)
            further += border + normed + 2 * queries + pairs  # the context is as wide as the queries
        moe = model.moe if layer.moe else None
        inner = self._width * tokens * model.ffn_size * self._fan / strategy.tp
        fused = {"qkv_input"} if model.mla is None else set()
        if moe is None:
            fused.add("mlp_normed")
        # the down projections of latents quantize it each on its own; the router keeps it as it is
        qkv_input = normed * (2 if model.mla is not None and self._input < self._width else 1)
        return Tensors(
            attention_input=self.norm_input * border,
            qkv_input=qkv_input,
            **self._attention(tokens, strategy),
            scores=self._core(layer, strategy, samples),
            mlp_input=self.norm_input * border if model.norms_per_layer > 1 else 0.0,
            mlp_normed=(normed if moe is None else border) if model.norms_per_layer > 1 else 0.0,
            mlp_inner=inner if moe is None else 0.0,
            **self._experts(moe, tokens, strategy),
            further=further,
            fused_norms=frozenset(fused),
            latent=model.mla is not None,
            dense=moe is None,
        )

    def allocations(self, layer: LayerType, strategy: Strategy, samples: int) -> tuple[Allocation, ...]:
        """The tensors of one block's forward pass without recomputation, in the order in which they are made."""
        model, found = self._model, self.block(layer, strategy, samples)
        tokens = samples * self._job.sequence(encoder=layer.encoder) / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        border = self._width * tokens * model.hidden_size / sp
        mask = tokens * model.hidden_size / sp if model.hidden_dropout else 0.0
        made = [(found.attention_input, True), (found.qkv_input, True), (found.latents, True)]
        seq = self._job.sequence(encoder=layer.encoder)
        made += [(found.latent_normed, True), (found.heads, True), *self._core_allocations(strategy, samples, seq, seq)]
        made += [(found.context, False), (found.context, True), (border, False), (mask, True)]
        if layer.cross:
            read = self._job.sequence(encoder=True)
            queries, pairs = self._cross(tokens, strategy, samples)
            made += [(border, True), (border * self._input / self._width, True), (queries, True), (pairs, True)]
            made += [*self._core_allocations(strategy, samples, seq, read), (queries, False), (queries, True)]
            made += [(border, False), (mask, True)]
        made += [(found.mlp_input, True), (found.mlp_normed, True), (found.router, True), (found.expert_input, True)]
        activated = found.mlp_inner * self._input / self._width / self._fan
        made += [(found.mlp_inner - activated, True), (activated, True)]
        made += [(found.expert_inner, True), (found.activated, True), (found.shared, True)]
        made += [(border, False), (mask, True)]
        return tuple((int(size), kept) for size, kept in made if size >= 1)

    def _core_allocations(self, strategy: Strategy, samples: int, queries: int, keys: int) -> list[tuple[float, bool]]:
        """What an attention core keeps, and the scores of an unfused one."""
        kept = [(size, True) for size in self._scores(strategy, samples, queries, keys)]
        if self._job.flash_attention or self._runtime.keeps_scores:
            return kept
        return [(self._width * self._pairs(strategy, samples, queries, keys), False), *kept]

    @property
    def _fan(self) -> float:
        """Width of what an MLP keeps, in multiples of its inner width: the activation function's input and output, and
        where its operators are PyTorch's what they hand on."""
        model, output = self._model, self._input / self._width
        if not self._runtime.eager:
            return (2 if model.gated_mlp else 1) + output
        return eager.mlp_tensors(model) + output

    def _attention(self, tokens: float, strategy: Strategy) -> dict[str, float]:
        """What the linear layers of attention and the core keep: q, k, v, the context, latents of MLA (whole on every
        rank). The output projection shares the core's context."""
        model, mla = self._model, self._model.mla
        if mla is None:
            width = self._width * tokens / strategy.tp
            kept = float(model.q_width + 2 * model.kv_width)
            if model.qk_norm is not QkNorm.NONE:
                kept += self._norm_tensors * (model.q_width + model.kv_width)
            kept += eager.besides_heads(model) if self._runtime.eager else 0
            return {"latents": 0.0, "latent_normed": 0.0, "heads": width * kept, "context": width * model.q_width}
        heads = self._width * tokens * model.num_heads / strategy.tp
        latents = (mla.q_lora_rank or 0) + mla.kv_lora_rank
        return {
            "latents": self._width * tokens * (latents + mla.qk_rope_dim),
            "latent_normed": self._input * tokens * latents,
            "heads": heads * (2 * (mla.qk_nope_dim + mla.qk_rope_dim) + mla.v_dim),
            "context": heads * mla.v_dim,
        }

    def _cross(self, tokens: float, strategy: Strategy, samples: int) -> tuple[float, float]:
        """Cross-attention's queries of the decoder, and its keys and values of the encoder, whose output is kept once
        for all layers (the head has it)."""
        width = self._width / strategy.tp
        read = samples * self._job.sequence(encoder=True) / strategy.cp
        return width * tokens * self._model.q_width, 2 * width * read * self._model.kv_width

    def _core(self, layer: LayerType, strategy: Strategy, samples: int) -> float:
        """What the attention cores keep."""
        seq = self._job.sequence(encoder=layer.encoder)
        kept = sum(self._scores(strategy, samples, seq, seq))
        return (
            kept + sum(self._scores(strategy, samples, seq, self._job.sequence(encoder=True))) if layer.cross else kept
        )

    def _scores(self, strategy: Strategy, samples: int, queries: int, keys: int) -> list[float]:
        """What one core keeps: row statistics (fused), or of the matrices of queries and keys the scores, their softmax
        in 32 and in 16 bits, dropout's output and its mask (unfused)."""
        model, runtime, width = self._model, self._runtime, self._width
        pairs = self._pairs(strategy, samples, queries, keys)
        if self._job.flash_attention:
            rows = pairs / keys
            copies = width * rows * head_widths(model)[1] if self._attention_copies and samples > 1 else 0
            return [4 * rows + copies]  # fp32 log-sum-exp
        batches = samples * model.num_heads // strategy.tp
        widened = runtime.softmax_in_fp32 and not fuses_softmax(runtime.softmax_length, batches, queries, keys)
        widths = [width] if runtime.keeps_scores else []
        widths.append(4 if widened else width)
        if model.attention_dropout:
            widths += [width, 1]
        elif widened and width < 4:
            widths.append(width)
        return [size * pairs for size in widths]

    def _pairs(self, strategy: Strategy, samples: int, queries: int, keys: int) -> float:
        """Pairs of queries and keys of the heads of one rank."""
        return samples * self._model.num_heads / strategy.tp * (queries / strategy.cp) * keys

    def _experts(self, moe: Moe | None, tokens: float, strategy: Strategy) -> dict[str, float]:
        """Routed tokens as experts read them, the activation function's input and output; shared experts.

        Experts scale their tokens inside the activation function, so that what they return is not kept."""
        if moe is None:
            return dict.fromkeys(("expert_input", "expert_inner", "activated", "router", "shared"), 0.0)
        model, width = self._model, self._width
        sp = strategy.tp if strategy.sequence_parallel else 1
        routed = tokens * moe.top_k * strategy.etp / strategy.tp
        inner = routed * moe.expert_ffn_size / strategy.etp
        activated = inner * self._input
        if not model.gated_mlp or self._runtime.eager:
            activated += inner * width  # no fused kernel scales the output, or gates the input: one more between
        return {
            "expert_input": routed * self._input * model.hidden_size,
            "expert_inner": inner * width * (2 if model.gated_mlp else 1),
            "activated": activated,
            "router": 12 * tokens * moe.num_experts / sp,  # in fp32
            "shared": width * tokens * moe.shared_ffn_size * self._fan / strategy.tp,
        }
