"""Bytes that a transformer block keeps for its backward pass, tensor by tensor.

With 16-bit linear layers this is the 34 sbh + 5 a s^2 b of arXiv 2205.05198 for a GPT block. With 8- and 4-bit ones the
narrow copy that backward reads is kept instead of a linear layer's input, unless another layer keeps that input anyway.
What each module keeps, and what its recomputation frees, follows megatron-core 0.16 (transformer_config.py,
``recompute_modules``; multi_latent_attention.py; moe/experts.py) and TransformerEngine.

Symbols: t = b * s / cp tokens of the rank; u = 2 t h / sp bytes, one hidden-width tensor at a layer's border.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniap_tune.cost.compute import head_widths
from uniap_tune.cost.runtime import CORE_ATTENTION, EXPERT_ACTIVATION, EXPERTS, LATENT_UP, MLP, NORMS, SHARED_EXPERTS
from uniap_tune.graph import LayerType
from uniap_tune.spec import DType, Job, Mla, Model, Moe, QkNorm
from uniap_tune.strategy import Strategy

# Bytes of a kept input element with its scales: MXFP8 has one scale byte for 32 elements, NVFP4 one for 16.
NARROW_BYTES = {DType.FP8: 1.0, DType.MXFP8: 1 + 1 / 32, DType.NVFP4: 0.5 + 1 / 16}


@dataclass(frozen=True, slots=True)
class Tensors:
    """Bytes of one micro-batch's tensors in a block, each next to the module whose recomputation frees it.

    Attributes:
        inputs: inputs of the two norms (and of further ones), dropout masks; only recomputing the block frees them.
        norms: outputs of norms that are layers of their own.
        attention: what its linear layers and its output keep.
        up: queries, keys and values that latent attention projects up.
        core: what the attention core keeps beyond them.
        mlp: of a dense MLP, its norm's output included.
        experts: of routed experts, without ``activated``.
        activated: output of the experts' activation function.
        shared: of shared experts.
    """

    inputs: float
    norms: float
    attention: float
    up: float
    core: float
    mlp: float
    experts: float
    activated: float
    shared: float

    @property
    def whole(self) -> float:
        """All of them."""
        attention = self.attention + self.up + self.core
        return self.inputs + self.norms + attention + self.mlp + self.experts + self.activated + self.shared

    def freed(self, modules: frozenset[str]) -> float:
        """Bytes that recomputing the modules frees."""
        parts = {
            CORE_ATTENTION: self.core,
            NORMS: self.norms,
            LATENT_UP: self.up,
            MLP: self.mlp,
            EXPERTS: self.experts + self.activated + self.shared,
            EXPERT_ACTIVATION: 0.0 if EXPERTS in modules else self.activated,
            SHARED_EXPERTS: 0.0 if EXPERTS in modules else self.shared,
        }
        return sum(size for module, size in parts.items() if module in modules)


class ActivationModel:
    """Counts the tensors of blocks of one job.

    Args:
        model: what is trained.
        job: how.
        attention_copies: fused attention keeps a copy of its output in the order of the layer.
        keeps_scores: unfused attention keeps its scores too.
    """

    def __init__(self, model: Model, job: Job, *, attention_copies: bool, keeps_scores: bool = False) -> None:
        self._model = model
        self._job = job
        self._width = float(job.precision.param_bytes)
        self._input = NARROW_BYTES.get(job.precision.compute, self._width)
        self._attention_copies = attention_copies
        self._matrices = self._width * (2 if keeps_scores else 1)
        if model.attention_dropout:
            self._matrices += self._width + 1  # its output and its mask

    def block(self, layer: LayerType, strategy: Strategy, samples: int) -> Tensors:
        """The tensors of one block for one micro-batch on one rank."""
        model = self._model
        tokens = samples * self._job.sequence(encoder=layer.encoder) / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        border = self._width * tokens * model.hidden_size / sp
        masks = 2 * tokens * model.hidden_size / sp if model.hidden_dropout else 0.0  # a byte an element
        usual = min(model.norms_per_layer, 2)
        inputs = border * model.norms_per_layer + masks
        norm_output = border * self._input / self._width
        own_norms, fused_norms = 0.0, usual * norm_output
        attention, up = self._attention(tokens, strategy)
        if model.mla is not None:
            # a layer of its own, whose output both down projections keep, quantized each on its own
            own_norms += border if self._input == self._width else 2 * norm_output
            fused_norms -= norm_output
        core = self._core(layer, strategy, samples)
        if layer.cross:
            inputs += border + masks / 2
            attention += norm_output + self._cross(tokens, strategy, samples)
        mlp = experts = activated = shared = 0.0
        moe = model.moe if layer.moe else None
        if moe is not None:
            own_norms += border  # the router keeps it as it is, and shared experts then need no narrow copy
            fused_norms -= norm_output
            experts, activated, shared = self._experts(moe, tokens, strategy)
        else:
            mlp = norm_output + self._width * tokens * model.ffn_size * self._fan / strategy.tp
            fused_norms -= norm_output
        return Tensors(
            inputs=inputs,
            norms=own_norms,
            attention=attention + max(0.0, fused_norms),
            up=up,
            core=core,
            mlp=mlp,
            experts=experts,
            activated=activated,
            shared=shared,
        )

    @property
    def _fan(self) -> float:
        """Width of what an MLP keeps, in multiples of its inner width: the activation function's input and output."""
        return (2 if self._model.gated_mlp else 1) + self._input / self._width

    def _attention(self, tokens: float, strategy: Strategy) -> tuple[float, float]:
        """What the linear layers of attention and the core keep: q, k, v, the context, latents of MLA; and the part
        that projecting latents up again would free. The output projection shares the core's context."""
        model, width = self._model, self._width * tokens
        if model.mla is not None:
            return self._latent(model.mla, tokens, strategy)
        kept = 2 * model.q_width + 2 * model.kv_width
        if model.qk_norm is not QkNorm.NONE:
            kept += model.q_width + model.kv_width
        return width * kept / strategy.tp, 0.0

    def _latent(self, mla: Mla, tokens: float, strategy: Strategy) -> tuple[float, float]:
        """Latents, whole on every rank, before their norms and after; then heads: q, k, v and the context."""
        heads = tokens * self._model.num_heads / strategy.tp
        latents = (mla.q_lora_rank or 0) + mla.kv_lora_rank
        kept = self._width * tokens * (latents + mla.qk_rope_dim) + self._width * heads * mla.v_dim
        up = self._input * tokens * latents
        up += self._width * heads * (2 * (mla.qk_nope_dim + mla.qk_rope_dim) + mla.v_dim)
        return kept, up

    def _cross(self, tokens: float, strategy: Strategy, samples: int) -> float:
        """Cross-attention: queries and context of the decoder, keys and values of the encoder, whose output is kept
        once for all layers (the head has it)."""
        model = self._model
        read = samples * self._job.sequence(encoder=True) / strategy.cp
        return 2 * self._width * (tokens * model.q_width + read * model.kv_width) / strategy.tp

    def _core(self, layer: LayerType, strategy: Strategy, samples: int) -> float:
        """What the attention cores keep."""
        seq = self._job.sequence(encoder=layer.encoder)
        kept = self._scores(strategy, samples, seq, seq)
        return kept + self._scores(strategy, samples, seq, self._job.sequence(encoder=True)) if layer.cross else kept

    def _scores(self, strategy: Strategy, samples: int, queries: int, seq: int) -> float:
        """What one core keeps: row statistics (fused), or the matrices of queries and keys (unfused)."""
        model = self._model
        heads = samples * model.num_heads / strategy.tp
        rows = queries / strategy.cp
        if self._job.flash_attention:
            copies = self._width * heads * rows * head_widths(model)[1] if self._attention_copies and samples > 1 else 0
            return 4 * heads * rows + copies  # fp32 log-sum-exp
        return self._matrices * heads * rows * seq

    def _experts(self, moe: Moe, tokens: float, strategy: Strategy) -> tuple[float, float, float]:
        """Routed tokens as experts read them, the activation function's input and output; shared experts.

        Experts scale their tokens inside the activation function, so that what they return is not kept."""
        model, width = self._model, self._width
        sp = strategy.tp if strategy.sequence_parallel else 1
        routed = tokens * moe.top_k * strategy.etp / strategy.tp
        gate = 2 if model.gated_mlp else 1
        router = 12 * tokens * moe.num_experts / sp  # logits, probabilities and maps in fp32
        experts = routed * (self._input * model.hidden_size + width * gate * moe.expert_ffn_size / strategy.etp)
        activated = routed * self._input * moe.expert_ffn_size / strategy.etp
        if not model.gated_mlp:  # no fused kernel scales the output, so that it is kept before and after
            activated += routed * width * moe.expert_ffn_size / strategy.etp
        shared = width * tokens * moe.shared_ffn_size * self._fan / strategy.tp
        return experts + router, activated, shared
