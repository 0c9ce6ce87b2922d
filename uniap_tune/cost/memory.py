"""Bytes of one layer on one rank, each term by name.

States are those of arXiv 1910.02054 section 3 (bytes a parameter, sharded by the ZeRO stage); activations are counted
tensor by tensor and reproduce the 34 sbh + 5 a s^2 b of arXiv 2205.05198 for a GPT block.

Symbols: t = b * s / cp tokens of the rank; u = 2 t h / sp bytes, one hidden-width tensor at a layer's border.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniap_tune.cost.compute import head_widths
from uniap_tune.cost.efficiency import Efficiency
from uniap_tune.cost.runtime import Runtime
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.spec import DType, Job, Model, QkNorm, Recompute
from uniap_tune.strategy import Capabilities, Strategy
from uniap_tune.weights import rank_expert_parameters, rank_parameters, rank_shared_parameters

# Bytes of a kept input element with its scales: MXFP8 has one scale byte for 32 elements, NVFP4 one for 16.
_INPUT_BYTES = {DType.FP8: 1.0, DType.MXFP8: 1 + 1 / 32, DType.NVFP4: 0.5 + 1 / 16}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of one layer on one rank: those outside routed experts, and the routed experts'."""

    dense: float
    expert: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.expert


@dataclass(frozen=True, slots=True)
class States:
    """Bytes that live for the whole step, and ``step`` bytes that live only during the optimizer step."""

    parameters: float
    gradients: float
    optimizer: float
    step: float


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes a micro-batch in flight holds, and bytes needed only while the layer runs."""

    kept: float
    transient: float


class MemoryModel:
    """Counts bytes of layers of one job."""

    def __init__(
        self, model: Model, job: Job, capabilities: Capabilities, runtime: Runtime, efficiency: Efficiency
    ) -> None:
        self._model = model
        self._job = job
        self._runtime = runtime
        precision = job.precision
        self._param_bytes = precision.param_bytes
        self._gradient_bytes = gradient_bytes(job, capabilities)
        self._width = precision.param_bytes
        # inputs of linear layers are kept for their weight gradients in the format the GEMM reads
        self._input = _INPUT_BYTES.get(precision.compute, float(self._width))
        self._attention_copies = efficiency.attention_copies and runtime.transformer_engine
        # Gradients kept narrower than fp32 are copied to fp32 when the optimizer runs, the copy freed after it.
        self._step_bytes = 4 if precision.master_bytes and self._gradient_bytes < 4 else 0
        self._parameters: dict[tuple[object, ...], Parameters] = {}

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an accumulated gradient."""
        return self._gradient_bytes

    def parameters(self, layer: LayerType, strategy: Strategy, *, shares_embedding: bool) -> Parameters:
        """Parameters on the fullest rank. ``shares_embedding``: a tied head uses the embedding of its own stage."""
        tp, ep, etp = strategy.tp, strategy.ep, strategy.etp
        key = (layer, tp, ep, etp, shares_embedding)
        found = self._parameters.get(key)
        if found is None:
            padded = self._runtime.vocab_rows(self._model.vocab_size, tp)
            total = rank_parameters(self._model, layer, tp, etp=etp, ep=ep, padded_vocab=padded)
            if layer.kind is LayerKind.HEAD and shares_embedding:
                total -= rank_shared_parameters(self._model, tp, padded_vocab=padded)
            expert = rank_expert_parameters(self._model, layer, etp=etp, ep=ep) if layer.moe else 0
            found = self._parameters[key] = Parameters(total - expert, expert)
        return found

    def states(self, parameters: Parameters, strategy: Strategy) -> States:
        """Parameters, gradients and optimizer states under a ZeRO stage.

        Dense parameters shard over dp * cp ranks, experts over the ranks that hold the same experts.
        """
        shard = max(1, strategy.dp * strategy.cp // self._runtime.optimizer_instances)
        expert_shard = max(1, strategy.num_devices // (strategy.ep * strategy.etp))
        full = parameters.total
        sharded = parameters.dense / shard + parameters.expert / expert_shard
        optimizer = sharded if strategy.zero >= 1 else full
        gradients = sharded if strategy.zero >= 2 else full
        held = sharded if strategy.zero >= 3 else full
        return States(
            self._param_bytes * held,
            self._gradient_bytes * gradients,
            (self._job.state_bytes + self._job.precision.master_bytes) * optimizer,
            self._step_bytes * optimizer,
        )

    def activations(self, layer: LayerType, strategy: Strategy, samples: int) -> Activations:
        """Activation bytes of one micro-batch under the strategy's recompute mode."""
        if layer.kind is LayerKind.EMBEDDING:
            return self._embedding(strategy, samples)
        if layer.kind is LayerKind.HEAD:
            return self._head(strategy, samples)
        tokens = samples * self._job.seq_length / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        border = self._width * tokens * self._model.hidden_size / sp
        core = self._core(strategy, samples)
        whole = self._norms(tokens, strategy, border) + self._attention(tokens, strategy) + core
        whole += self._feed_forward(layer, tokens, strategy)
        if strategy.recompute is Recompute.FULL:
            return Activations(border, whole)
        if strategy.recompute is Recompute.SELECTIVE:
            return Activations(whole - core, core)
        return Activations(whole, 0.0)

    def _norms(self, tokens: float, strategy: Strategy, border: float) -> float:
        """Input and output of the norms, dropout masks (1 byte), and the inputs of norms beyond the usual two."""
        model = self._model
        usual = min(model.norms_per_layer, 2)
        norms = border * (usual * (1 + self._input / self._width) + max(0, model.norms_per_layer - 2))
        if model.hidden_dropout:
            sp = strategy.tp if strategy.sequence_parallel else 1
            norms += 2 * tokens * model.hidden_size / sp
        return norms

    def _attention(self, tokens: float, strategy: Strategy) -> float:
        """What the linear layers of attention and the core keep: q, k, v, the context, latents of MLA."""
        model, width = self._model, self._width * tokens
        if model.mla is not None:
            mla = model.mla
            latents = 2 * ((mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_dim)
            queries = mla.qk_nope_dim + mla.qk_rope_dim
            per_head = 2 * queries + mla.qk_nope_dim + 4 * mla.v_dim
            return width * (latents + model.num_heads / strategy.tp * per_head)
        kept = 2 * model.q_width + 2 * model.kv_width
        if model.qk_norm is not QkNorm.NONE:
            kept += model.q_width + model.kv_width
        # in 8- and 4-bit formats the output projection keeps a narrow copy of the context, which the core keeps too
        narrow = tokens * self._input * model.q_width if self._input < self._width else 0.0
        return (width * kept + narrow) / strategy.tp

    def _core(self, strategy: Strategy, samples: int) -> float:
        """What the attention core keeps: row statistics (fused), or the s x s matrices (unfused)."""
        model, seq = self._model, self._job.seq_length
        heads = samples * model.num_heads / strategy.tp
        rows = seq / strategy.cp
        if self._job.flash_attention:
            copies = self._width * heads * rows * head_widths(model)[1] if self._attention_copies and samples > 1 else 0
            return 4 * heads * rows + copies  # fp32 log-sum-exp
        matrices = self._width + (self._width + 1 if model.attention_dropout else 0)
        return matrices * heads * rows * seq

    def _feed_forward(self, layer: LayerType, tokens: float, strategy: Strategy) -> float:
        """Input and output of the activation function; for experts also the routed tokens, in and out."""
        model, width = self._model, self._width
        fan = (2 if model.gated_mlp else 1) + self._input / width
        moe = model.moe
        if not layer.moe or moe is None:
            return width * tokens * model.ffn_size * fan / strategy.tp
        sp = strategy.tp if strategy.sequence_parallel else 1
        routed = tokens * moe.top_k * strategy.etp / strategy.tp
        ends = (self._input + width) * model.hidden_size  # what experts read, and what they return
        experts = routed * (ends + width * moe.expert_ffn_size * fan / strategy.etp)
        shared = width * tokens * moe.shared_ffn_size * fan / strategy.tp
        router = 12 * tokens * moe.num_experts / sp  # logits, probabilities and maps in fp32
        return experts + shared + router

    def _embedding(self, strategy: Strategy, samples: int) -> Activations:
        """Token ids, positions, labels and loss mask of a micro-batch, and the dropout mask."""
        model = self._model
        tokens = samples * self._job.seq_length / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        kept = 8 * tokens + (tokens * model.hidden_size / sp if model.hidden_dropout else 0)
        if model.embedding_norm:
            kept += self._width * tokens * model.hidden_size / sp
        return Activations(kept, self._width * tokens * model.hidden_size)

    def head_backward(self, strategy: Strategy, samples: int) -> float:
        """Bytes of activations while the output matrix gets its gradient: of the logits, and the norm's."""
        tokens = samples * self._job.seq_length / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        vocab = self._runtime.vocab_rows(self._model.vocab_size, strategy.tp) / strategy.tp
        return self._width * tokens * (2 * self._model.hidden_size / sp + vocab)

    def _head(self, strategy: Strategy, samples: int) -> Activations:
        """The final norm and the logits; a micro-batch's backward follows its forward at once on the last stage."""
        model = self._model
        tokens = samples * self._job.seq_length / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        border = self._width * tokens * model.hidden_size / sp
        vocab = self._runtime.vocab_rows(model.vocab_size, strategy.tp) / strategy.tp
        scale = self._width / 2
        return Activations(0.0, 2 * border + self._runtime.loss_bytes * scale * tokens * vocab)


def gradient_bytes(job: Job, capabilities: Capabilities) -> int:
    """Bytes of an accumulated gradient: the job's wish, fp32 for fp32 training, else the engine's choice.

    Megatron accumulates bf16 gradients in fp32 by default but fp16 gradients in fp16
    (``--accumulate-allreduce-grads-in-fp32``, arguments.py).
    """
    precision = job.precision
    if precision.gradient_bytes is not None:
        return precision.gradient_bytes
    if precision.compute is DType.FP32:
        return 4
    return 2 if precision.compute is DType.FP16 else capabilities.gradient_bytes
