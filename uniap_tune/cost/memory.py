"""Bytes of one layer on one rank, each term by name.

States are those of arXiv 1910.02054 section 3 (bytes a parameter, sharded by the ZeRO stage); activations of blocks are
counted tensor by tensor in :mod:`.activations`.

Symbols: t = b * s / cp tokens of the rank; u = 2 t h / sp bytes, one hidden-width tensor at a layer's border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uniap_tune.accumulation import gradient_bytes, holds_gradients_twice, master_bytes
from uniap_tune.cost.activations import NARROW_BYTES, ActivationModel
from uniap_tune.cost.allocator import uncut_activations, uncut_states
from uniap_tune.cost.efficiency import Efficiency
from uniap_tune.cost.runtime import Runtime
from uniap_tune.graph import LayerKind, LayerType, block_type
from uniap_tune.spec import DType, Job, Model, Recompute
from uniap_tune.strategy import Capabilities, Strategy, Target
from uniap_tune.weights import (
    rank_expert_parameters,
    rank_linear_parameters,
    rank_parameters,
    rank_shared_parameters,
    rank_tensors,
)

_MIXED = 2  # bytes of a parameter whose optimizer keeps an fp32 copy
_SIMULATED_LAYERS = 16  # equal layers whose allocations are followed one by one


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of one layer on one rank: those outside routed experts, and the routed experts'; ``linear``: those of
    either kind in matrices that 8- and 4-bit training quantizes."""

    dense: float
    expert: float
    linear: float = 0.0

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
        self._capabilities = capabilities
        precision = job.precision
        self._param_bytes = precision.param_bytes
        self._gradient_bytes = gradient_bytes(job, capabilities)
        self._width = precision.param_bytes
        self._tensors_of_their_own = capabilities.target is Target.MEGATRON
        copies = efficiency.attention_copies and runtime.transformer_engine
        self._blocks = ActivationModel(model, job, runtime, attention_copies=copies)
        # Weights are quantized once a step and kept, along rows and along columns; GEMMs of FP8 from Blackwell on read
        # one copy either way (TransformerEngine, is_non_tn_fp8_gemm_supported).
        copies_held = 1 if precision.compute is DType.FP8 and not efficiency.transposed_weights else 2
        self._narrow_weight = copies_held * NARROW_BYTES.get(precision.compute, 0.0)
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
            cut = self._cut(layer, tp)
            padded = self._runtime.vocab_rows(self._model.vocab_size, cut)
            total = rank_parameters(self._model, layer, cut, etp=etp, ep=ep, padded_vocab=padded)
            if layer.kind is LayerKind.HEAD and shares_embedding:
                total -= rank_shared_parameters(self._model, cut, padded_vocab=padded)
            expert = rank_expert_parameters(self._model, layer, etp=etp, ep=ep)
            linear = rank_linear_parameters(self._model, layer, tp, etp=etp, ep=ep) if self._narrow_weight else 0
            found = self._parameters[key] = Parameters(total - expert, expert, linear)
        return found

    def _cut(self, layer: LayerType, tp: int) -> int:
        """Into how many parts the weights of a layer are cut."""
        match layer.kind:
            case LayerKind.EMBEDDING:
                return self._runtime.embedding_parts(tp)
            case LayerKind.HEAD:
                return self._runtime.output_parts(tp)
            case LayerKind.BLOCK:
                return tp

    def uncut_states(self, layers: Sequence[tuple[LayerType, Strategy, int]], *, shares_embedding: bool) -> float:
        """What the allocator counts beyond the states of so many of each layer, in Megatron's mixed precision, where no
        distributed optimizer puts them into flat buffers."""
        precision, job = self._job.precision, self._job
        mixed = precision.param_bytes == _MIXED and precision.master_bytes == 4 and job.state_bytes == 8
        if not (self._tensors_of_their_own and mixed) or any(strategy.zero for _, strategy, _ in layers):
            return 0.0
        sizes: list[int] = []
        for layer, strategy, times in layers:
            tp, ep, etp = strategy.tp, strategy.ep, strategy.etp
            padded = self._runtime.vocab_rows(self._model.vocab_size, tp)
            shared = layer.kind is not LayerKind.HEAD or not shares_embedding
            sizes += times * rank_tensors(self._model, layer, tp, etp=etp, ep=ep, padded_vocab=padded, shared=shared)
        return float(uncut_states(tuple(sizes), precision.param_bytes, self._gradient_bytes))

    def uncut_activations(self, layer: LayerType, strategy: Strategy, samples: int, times: int) -> float:
        """What the allocator counts beyond the activations that so many equal blocks keep of one micro-batch."""
        if layer.kind is not LayerKind.BLOCK or strategy.recompute is not Recompute.NONE or not times:
            return 0.0
        simulated = min(times, _SIMULATED_LAYERS)
        made = self._blocks.allocations(layer, strategy, samples)
        return uncut_activations(made, simulated) * times / simulated

    def shards_optimizer(self, strategy: Strategy, pp: int) -> bool:
        """Whether the optimizer's states are sharded over the replicas."""
        return strategy.zero >= 1 or self.holds_gradients_twice(strategy, pp)

    def holds_gradients_twice(self, strategy: Strategy, pp: int) -> bool:
        """Whether gradients are held as the backward pass makes them, too."""
        return holds_gradients_twice(self._job, self._capabilities, zero=strategy.zero, pp=pp)

    def states(self, parameters: Parameters, strategy: Strategy, pp: int) -> States:
        """Parameters, gradients and optimizer states under a ZeRO stage.

        Dense parameters shard over dp * cp ranks, experts over the ranks that hold the same experts.
        """
        instances = self._runtime.optimizer_instances
        shard = max(1, strategy.dp * strategy.cp // instances)
        expert_shard = max(1, strategy.num_devices // (strategy.ep * strategy.etp * instances))
        full = parameters.total
        sharded = parameters.dense / shard + parameters.expert / expert_shard
        optimizer = sharded if self.shards_optimizer(strategy, pp) else full
        gradients = self._gradient_bytes * (sharded if strategy.zero >= 2 else full)
        if self.holds_gradients_twice(strategy, pp):
            gradients += self._width * full
        held = sharded if strategy.zero >= 3 else full
        narrow = 0.0
        if strategy.zero < 3:  # gathered ones are quantized as they come
            replaced = self._param_bytes if self._runtime.narrow_parameters else 0
            narrow = (self._narrow_weight - replaced) * parameters.linear
        return States(
            self._param_bytes * held + narrow,
            gradients,
            (self._job.state_bytes + master_bytes(self._job, self._capabilities, strategy.zero)) * optimizer,
            self._copied(strategy) * optimizer,
        )

    def _copied(self, strategy: Strategy) -> int:
        """Bytes of a gradient's copies while the optimizer runs; DeepSpeed's ZeRO-2 first joins the gradients that it
        holds tensor by tensor (zero/stage_1_and_2.py, ``get_flat_partition``)."""
        joins = self._capabilities.target is Target.DEEPSPEED and strategy.zero == 2
        return self._step_bytes + (self._gradient_bytes if joins and self._step_bytes else 0)

    def activations(self, layer: LayerType, strategy: Strategy, samples: int) -> Activations:
        """Activation bytes of one micro-batch under the strategy's recompute mode."""
        if layer.kind is LayerKind.EMBEDDING:
            return self._embedding(strategy, samples)
        if layer.kind is LayerKind.HEAD:
            return self._head(strategy, samples)
        tokens = samples * self._job.sequence(encoder=layer.encoder) / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        border = self._width * tokens * self._model.hidden_size / sp
        tensors = self._blocks.block(layer, strategy, samples)
        if strategy.recompute is Recompute.FULL:
            return Activations(border, tensors.whole)
        selective = strategy.recompute is Recompute.SELECTIVE
        recomputed = self._runtime.recompute_modules if selective else frozenset[str]()
        freed = tensors.freed(recomputed, self._runtime.offload_modules)
        # of what the host keeps, the next layer's is on its way while this one's is used
        moving = freed - tensors.freed(recomputed)
        return Activations(tensors.whole - freed, freed + moving)

    def _embedding(self, strategy: Strategy, samples: int) -> Activations:
        """Token ids, positions, labels and loss mask of a micro-batch, and the dropout mask."""
        model, job = self._model, self._job
        tokens = samples * job.seq_length / strategy.cp
        if model.encoder_layers:
            tokens += samples * job.sequence(encoder=True) / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        kept = 8 * tokens + (tokens * model.hidden_size / sp if model.hidden_dropout else 0)
        if model.embedding_norm:
            kept += self._width * tokens * model.hidden_size / sp
        return Activations(kept, self._width * tokens * model.hidden_size)

    def head_backward(self, strategy: Strategy, samples: int) -> float:
        """Bytes of activations while the output matrix gets its gradient: of the logits, and the norm's."""
        border, logits = self._output(strategy, samples)
        return 2 * border + self._width * logits

    def _output(self, strategy: Strategy, samples: int) -> tuple[float, float]:
        """Bytes of one hidden-width tensor at the output layer, and the number of logits."""
        tokens = samples * self._job.seq_length / strategy.cp
        sp = strategy.tp if strategy.sequence_parallel else 1
        rows = self._runtime.vocab_rows(self._model.vocab_size, strategy.tp)
        logits = tokens * rows / self._runtime.embedding_parts(strategy.tp)
        return self._width * tokens * self._model.hidden_size / sp, logits

    def _head(self, strategy: Strategy, samples: int) -> Activations:
        """The final norm and the logits; a micro-batch's backward follows its forward at once on the last stage."""
        border, logits = self._output(strategy, samples)
        scale = self._width / 2
        around = self._around_output(border) + self._extra(strategy, samples) + self._batch(strategy, samples)
        norm = (1 + self._blocks.norm_input) * border
        return Activations(0.0, norm + self._runtime.loss.held * scale * logits + around)

    def buffers(self, layer: LayerType, strategy: Strategy, samples: int) -> float:
        """Bytes that a layer's exchanges hold for good: with sequence parallelism the output layer gathers the sequence
        into a buffer (megatron/core/tensor_parallel/layers.py, "mpu")."""
        if layer.kind is not LayerKind.HEAD or not strategy.sequence_parallel or strategy.tp == 1:
            return 0.0
        return self._width * samples * self._job.seq_length / strategy.cp * self._model.hidden_size

    def deferred(self, layer: LayerType, strategy: Strategy, samples: int, num_microbatches: int) -> float:
        """Gradients of logits, and the output layer's input, of the micro-batches whose gradient of the output matrix
        waits (megatron/core/tensor_parallel/layers.py, ``grad_output_buffer``; it needs fused accumulation)."""
        limit = self._runtime.deferred_gradients
        if layer.kind is not LayerKind.HEAD or limit is None or not self._runtime.gradient_fusion:
            return 0.0
        border, logits = self._output(strategy, samples)
        return min(limit or num_microbatches, num_microbatches) * (self._width * logits + border)

    def _batch(self, strategy: Strategy, samples: int) -> float:
        """The mask of a micro-batch from the data loader: a byte a pair of tokens of each sequence."""
        if not self._runtime.loads_mask:
            return 0.0
        job = self._job
        pairs = job.seq_length**2
        if self._model.encoder_layers:
            pairs += job.sequence(encoder=True) * (job.sequence(encoder=True) + job.seq_length)
        return samples * pairs / strategy.cp

    def _around_output(self, border: float) -> float:
        """BERT's transform keeps what its activation function and its norm read, and the norm's output; the norm after
        an encoder its input and output."""
        kept = 3 * border if self._model.head_transform else 0.0
        if self._model.encoder_layers:
            kept += 2 * border * self._job.sequence(encoder=True) / self._job.seq_length
        return kept

    def _extra(self, strategy: Strategy, samples: int) -> float:
        """Multi-token prediction, which waits for the head's backward: of each module the two vectors it joins, its
        block (never recomputed here), its norm, and what its loss keeps of its logits: probabilities in fp32, or with
        TransformerEngine's loss 16-bit gradients in their place."""
        model = self._model
        if not model.mtp_layers:
            return 0.0
        border, logits = self._output(strategy, samples)
        block = self._blocks.block(block_type(model, model.num_layers - 1), strategy, samples)
        kept = min(self._runtime.loss.held - self._width, 4.0)
        return model.mtp_layers * (6 * border + block.whole + kept * logits)
