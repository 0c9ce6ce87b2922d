"""Seconds of what the ranks of one replica exchange while a layer runs: tensor, context and expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from uniap_tune.autotp import Vocabulary
from uniap_tune.cost.comm import Group, Network
from uniap_tune.cost.compute import ComputeModel
from uniap_tune.cost.efficiency import Efficiency
from uniap_tune.cost.operators import Shape, head_widths
from uniap_tune.cost.runtime import Runtime
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.spec import Job, Model

# Part of the exchange of experts' tokens that slows computation even where another micro-batch's hides it, its own
# kernels and copies [Empirical].
_EXPERT_EXPOSED = 0.25


@dataclass(frozen=True, slots=True)
class Communication:
    """Exposed seconds of one micro-batch of a layer, forward and backward, by part."""

    tp_forward: float
    tp_backward: float
    cp_forward: float
    cp_backward: float
    ep_forward: float
    ep_backward: float


class ExchangeModel:
    """Prices the exchanges inside a replica of one job on one network."""

    def __init__(
        self,
        model: Model,
        job: Job,
        efficiency: Efficiency,
        network: Network,
        compute: ComputeModel,
        runtime: Runtime,
    ) -> None:
        self._model = model
        self._runtime = runtime
        self._tensor_exposed = efficiency.tp_exposed
        self._job = job
        self._network = network
        self._compute = compute
        self._width = job.precision.param_bytes
        self._cache: dict[tuple[LayerType, Shape], Communication] = {}

    def layer(self, layer: LayerType, shape: Shape) -> Communication:
        """Exposed seconds of one micro-batch of a layer, without those of data parallelism."""
        key = (layer, shape)
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._price(layer, shape)
        return found

    def _price(self, layer: LayerType, shape: Shape) -> Communication:
        """Tensor parallelism: an all-reduce (with sequence parallelism its halves) for attention, for cross-attention
        and for the MLP, arXiv 1909.08053 section 3, backward for each layer that is cut along its outputs, and only
        those may hide behind GEMMs. Context parallelism: a ring of keys and values behind the attention core. Experts:
        dispatch and combine, each an all-to-all."""
        tokens = shape.samples * self._job.sequence(encoder=layer.encoder) / shape.cp
        border = self._width * tokens * self._model.hidden_size
        reduce = self._network.all_reduce(border, Group(shape.tp, 1))
        if layer.kind is not LayerKind.BLOCK:
            return self._ends(layer, shape, reduce, tokens)
        reduce *= self._tensor_exposed if self.overlaps_tensor(shape.sp) else 1.0
        cross = 1 if layer.cross else 0
        forward, backward = (2 + cross) * reduce, (self._runtime.column_layers + cross) * reduce
        cp_forward, cp_backward = self._ring(layer, shape)
        expert = self._experts(layer, shape, border)
        return Communication(forward, backward, cp_forward, cp_backward, expert, expert)

    def _ends(self, layer: LayerType, shape: Shape, reduce: float, tokens: float) -> Communication:
        """One all-reduce for the embedding and for the head where they are split; a head whose loss is not split
        gathers the logits. ``reduce``: seconds of an all-reduce of the hidden vectors."""
        split, half = self._runtime.vocabulary is Vocabulary.SPLIT, reduce / 2
        if layer.kind is LayerKind.EMBEDDING:
            if not split:
                return Communication(0, 0, 0, 0, 0, 0)
            return Communication(half if shape.sp > 1 else reduce, half if shape.sp > 1 else 0.0, 0, 0, 0, 0)
        if split:
            return Communication(half if shape.sp > 1 else 0.0, reduce, 0, 0, 0, 0)
        if self._runtime.vocabulary is Vocabulary.WHOLE:
            return Communication(0, 0, 0, 0, 0, 0)
        logits = self._width * tokens * self._model.vocab_size
        return Communication(self._network.all_gather(logits, Group(shape.tp, 1)), reduce, 0, 0, 0, 0)

    def overlaps_tensor(self, sp: int) -> bool:
        """Whether GEMMs hide tensor-parallel communication over ``sp`` parts of a sequence: user buffers hold such
        parts, and reach the devices of a node."""
        return self._runtime.overlap_tensor and 1 < sp <= self._network.node

    def _experts(self, layer: LayerType, shape: Shape, border: float) -> float:
        """Exposed seconds each way of dispatching tokens to experts and combining them again. Where that overlaps, the
        forward pass of one micro-batch hides behind the backward pass of another (arXiv 2412.19437 section 3.2)."""
        moe = self._model.moe
        if not layer.moe or moe is None or shape.ep == 1:
            return 0.0
        sent = border * shape.etp / shape.tp
        seconds = 2 * self._network.all_to_all(sent, moe.top_k, Group(shape.ep, shape.etp))
        if not self._runtime.overlap_experts:
            return seconds
        compute = self._compute.layer(layer, shape)
        hidden = min(seconds, (compute.forward + compute.backward) / 2)
        return seconds - hidden + _EXPERT_EXPOSED * hidden

    def _ring(self, layer: LayerType, shape: Shape) -> tuple[float, float]:
        """Exposed seconds of the ring exchange of keys and values (arXiv 2310.01889), hidden behind the core."""
        if shape.cp == 1:
            return 0.0, 0.0
        head, value = head_widths(self._model)
        heads = self._model.num_heads if self._model.mla is not None else self._model.num_kv_heads
        tokens = shape.samples * self._job.seq_length / shape.cp
        chunk = self._width * tokens * heads * (head + value) / shape.tp
        group = Group(shape.cp, shape.tp)
        transfer = self._network.all_gather(chunk * shape.cp, group)
        core = self._compute.layer(layer, shape).core
        hidden = (shape.cp - 1) / shape.cp * core
        # backward sends keys and values again and returns their gradients
        return max(0.0, transfer - hidden), max(0.0, 2 * transfer - 2.5 * hidden)
