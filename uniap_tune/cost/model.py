"""The cost model: what a layer costs under a strategy, in seconds and bytes. It prices the search and ``predict``.

    A[u,k]  = forward + backward of ``layer_cost``        seconds a micro-batch
    g[u,k]  = step of ``layer_cost``                      seconds once an optimizer step
    M[u,k,i] = static + in_flight(i) * microbatch         bytes; a stage also needs its largest transient
    R, R'   = ``reshard_seconds``, ``send_seconds``       seconds a micro-batch, forward and backward

Computation is a roofline for every operator (:mod:`.compute`), communication is alpha-beta over the real placement of
each group (:mod:`.comm`), bytes are counted tensor by tensor (:mod:`.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence

from uniap_tune.cost.comm import Group, Network
from uniap_tune.cost.compute import Compute, ComputeModel
from uniap_tune.cost.efficiency import Efficiency, efficiency_for
from uniap_tune.cost.exchange import Communication, ExchangeModel
from uniap_tune.cost.layout import Move, move
from uniap_tune.cost.memory import MemoryModel, Parameters
from uniap_tune.cost.operators import Shape, attended, head_widths
from uniap_tune.cost.parts import (
    ACTIVATIONS,
    BUFFERS,
    COMPUTE,
    CP_COMM,
    DP_COMM,
    EP_COMM,
    GRADIENTS,
    OPTIMIZER,
    OPTIMIZER_STATES,
    PARAMETERS,
    RECOMPUTE,
    TP_COMM,
    ZERO_COMM,
    LayerCost,
)
from uniap_tune.cost.runtime import EXPERTS, Runtime, default_runtime
from uniap_tune.graph import LayerKind, LayerType, build_graph
from uniap_tune.spec import Cluster, Job, Model, Recompute
from uniap_tune.strategy import Capabilities, Layout, Strategy
from uniap_tune.units import GIB, MIB
from uniap_tune.weights import layer_parameters, parameter_count

# CUDA context and loaded modules of a training process [Empirical].
_CONTEXT_BYTES = 0.6 * GIB
# NCCL's channels of the communicators inside a node, and of those between nodes [Empirical].
_NCCL_BYTES = 0.4 * GIB
# Freed but fragmented blocks of the caching allocator, as a fraction of the device's memory [Empirical]: B200 runs
# reserved 3-6% more than they had allocated, part of which the allocator gives back under pressure.
_FRAGMENTATION = 0.025
# CUBLAS_WORKSPACE_CONFIG=:4096:8, which deterministic mode demands: eight buffers of 4096 KiB.
_DETERMINISTIC_WORKSPACE_MIB = 32.0
# Streams over which TransformerEngine spreads the GEMMs of grouped experts, each with a workspace (module/_common.py,
# get_multi_stream_cublas_workspace).
_GROUPED_STREAMS = 4
# User buffers of TransformerEngine, a gathered sequence each: of every linear layer's forward, data gradient and, for
# those whose input is gathered, weight gradient (module/base.py, initialize_ub).
_USER_BUFFERS = 10
# Border tensors a stage keeps for receiving and sending [Empirical].
_BORDER_BUFFERS = 3.4
# Kernels of a backward pass for each of the forward pass [Empirical].
_BACKWARD_KERNELS = 1.25
# Modules of a layer of transformers, containers included: a block of Llama or GPT-2; embedding; norm and output layer.
_MODULES = {LayerKind.BLOCK: 13, LayerKind.EMBEDDING: 1, LayerKind.HEAD: 2}
# Bytes a parameter moves in the optimizer step: the gradient is read for its norm (4) and scaled by the clipping factor
# (8); Adam reads gradient, master weight and both moments and writes the last three (28) and the
# narrow parameter (2).
_OPTIMIZER_TRAFFIC = 42.0


class CostModel:
    """Prices layers of one model, trained as one job says, on one cluster, by one engine.

    Pure: equal questions get equal answers; results that many strategies share are cached on the instance.

    Args:
        model: what is trained.
        cluster: where.
        job: how.
        capabilities: the engine's properties that cost time or memory.
        runtime: how the engine executes; by default what its current release does.
        efficiency: constants of the GPU; by default those of its generation.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        job: Job,
        capabilities: Capabilities,
        *,
        runtime: Runtime | None = None,
        efficiency: Efficiency | None = None,
    ) -> None:
        self.model = model
        self.cluster = cluster
        self.job = job
        self.capabilities = capabilities
        self.runtime = runtime or default_runtime(capabilities, model, cluster)
        self.efficiency = efficiency or efficiency_for(cluster.device)
        self._network = Network(cluster, self.efficiency)
        self._compute = ComputeModel(model, cluster.device, job, self.efficiency, self.runtime)
        self._exchange = ExchangeModel(model, job, self.efficiency, self._network, self._compute, self.runtime)
        self._memory = MemoryModel(model, job, capabilities, self.runtime, self.efficiency)
        self._width = job.precision.param_bytes
        self._bandwidth = cluster.device.memory_bandwidth * self.efficiency.memory
        self._moves: dict[tuple[Layout, Layout], Move] = {}
        self._tied_embedding = model.tied_embeddings
        # asked only by engines that keep gathered parameters
        self._parameters = parameter_count(model) if self.runtime.reused_parameters else 0
        types = {layer.type for layer in build_graph(model).layers}
        self._blocks = sorted((t for t in types if t.kind is LayerKind.BLOCK), key=repr)

    # ---- layers -------------------------------------------------------------------------------------------------

    def layer_cost(
        self, layer: LayerType, strategy: Strategy, *, samples: int, pp: int, num_microbatches: int
    ) -> LayerCost:
        """Seconds and bytes of one layer on the fullest device of its stage.

        Args:
            layer: the layer's type.
            strategy: how it is spread over the stage's devices.
            samples: samples of one micro-batch on one data-parallel replica.
            pp: pipeline stages; a tied head has its own copy of the embedding when there are several.
            num_microbatches: micro-batches of a step.
        """
        sp = strategy.tp if strategy.sequence_parallel else 1
        shape = Shape(strategy.tp, strategy.cp, strategy.ep, strategy.etp, sp, samples)
        compute = self._compute.layer(layer, shape)
        comm = self._exchange.layer(layer, shape)
        parameters = self._memory.parameters(layer, strategy, shares_embedding=self._tied_embedding and pp == 1)
        forward_s, backward_s = self._microbatch(layer, strategy, compute, comm)
        self._add_zero(forward_s, backward_s, parameters, strategy, pp, num_microbatches)
        return self._with_bytes(layer, strategy, samples, pp, parameters, forward_s, backward_s, num_microbatches)

    def _microbatch(
        self, layer: LayerType, strategy: Strategy, compute: Compute, comm: Communication
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds forward and backward by part. Time the GPU spends waiting for launches counts as compute."""
        forward_s = {TP_COMM: comm.tp_forward, CP_COMM: comm.cp_forward, EP_COMM: comm.ep_forward}
        backward_s = {TP_COMM: comm.tp_backward, CP_COMM: comm.cp_backward, EP_COMM: comm.ep_backward}
        fetched = self.runtime.fetch_launches * _MODULES[layer.kind] if strategy.zero == 3 else 0.0
        again, launches, waits = 0.0, _BACKWARD_KERNELS * compute.kernels, compute.waits
        fetched_again = fetched
        if layer.kind is LayerKind.BLOCK:
            if strategy.recompute is Recompute.FULL:
                share = self.runtime.recompute_share
                again, launches = share * compute.forward, launches + share * compute.kernels
                fetched_again += share * fetched
                waits += share * compute.waits
                for part, seconds in forward_s.items():
                    backward_s[part] += share * seconds
            elif strategy.recompute is Recompute.SELECTIVE:
                again = compute.again
                backward_s[EP_COMM] += comm.ep_forward if EXPERTS in self.runtime.recompute_modules else 0.0
        sent, returned = sum(forward_s.values()), sum(backward_s.values())
        launched = self._compute.launched
        forth, back = compute.forward + sent, compute.backward + again + returned
        forth = launched(forth, compute.kernels, fetched=fetched, waits=compute.waits, experts=layer.moe)
        back = launched(back, launches, fetched=fetched_again, waits=waits, experts=layer.moe)
        forward_s[COMPUTE], backward_s[COMPUTE] = forth - sent, back - returned - again
        backward_s[RECOMPUTE] = again
        return forward_s, backward_s

    def _with_bytes(
        self,
        layer: LayerType,
        strategy: Strategy,
        samples: int,
        pp: int,
        parameters: Parameters,
        forward_s: dict[str, float],
        backward_s: dict[str, float],
        num_microbatches: int,
    ) -> LayerCost:
        states = self._memory.states(parameters, strategy, pp)
        activations = self._memory.activations(layer, strategy, samples)
        # the last stage, which has one micro-batch in flight, holds them until the pipeline is empty
        waiting = self._memory.deferred(layer, strategy, samples, num_microbatches) if pp > 1 else 0.0
        transient = self._transient(layer, parameters, strategy, samples, pp, activations.transient)
        return LayerCost(
            forward_s=forward_s,
            backward_s=backward_s,
            step_s=self._step(layer, parameters, strategy, pp, sum(forward_s.values()), sum(backward_s.values())),
            static_bytes={
                PARAMETERS: states.parameters,
                GRADIENTS: states.gradients,
                OPTIMIZER_STATES: states.optimizer,
                BUFFERS: self._memory.buffers(layer, strategy, samples),
            },
            microbatch_bytes={ACTIVATIONS: activations.kept + waiting},
            transient_bytes=transient,
            step_bytes=states.step,
        )

    def _transient(
        self, layer: LayerType, parameters: Parameters, strategy: Strategy, samples: int, pp: int, alive: float
    ) -> float:
        """Bytes while the layer runs: activations ``alive`` only then, weight gradients before they are accumulated,
        gathered ZeRO-3 parameters, gradients to be scattered, receive and send buffers at a stage's border."""
        gradient = self._width * self._at_once(parameters, strategy)
        if layer.kind is LayerKind.EMBEDDING:
            gradient = 0.0
        elif layer.kind is LayerKind.HEAD:
            # the loss, or after it the gradients of logits and output matrix; beside it the dummies of a block
            alive, gradient = max(alive, gradient + self._memory.head_backward(strategy, samples)), 0.0
            if self.runtime.gradient_fusion:
                gradient = self._width * self._block_parameters(strategy)
        gathered = 0.0
        if strategy.dp * strategy.cp > 1:
            if strategy.zero >= 3:
                # this layer and the next, prefetched, or those that are needed again soon
                again = min(self.runtime.reused_parameters, self._parameters / strategy.tp)
                gathered += self._width * max(2 * parameters.total, again)
            if strategy.zero >= 2:
                gathered += self._memory.gradient_bytes * parameters.total
        return alive + self.pipeline_bytes(strategy, samples=samples, pp=pp) + gradient + gathered

    def _at_once(self, parameters: Parameters, strategy: Strategy) -> float:
        """Parameters whose weight gradients exist at once: a layer's; of experts one, where gradients accumulate inside
        the GEMM, because the dummies that stand for them are shared by weights of one shape."""
        moe = self.model.moe
        if moe is None or not self.runtime.gradient_fusion:
            return parameters.total
        return parameters.dense + parameters.expert / -(-moe.num_experts // strategy.ep)

    def _block_parameters(self, strategy: Strategy) -> float:
        """Parameters of the largest block on one rank, as far as their gradients exist at once."""
        every = (self._memory.parameters(block, strategy, shares_embedding=False) for block in self._blocks)
        return max(self._at_once(parameters, strategy) for parameters in every)

    # ---- communication ------------------------------------------------------------------------------------------

    def _add_zero(
        self,
        forward_s: dict[str, float],
        backward_s: dict[str, float],
        parameters: Parameters,
        strategy: Strategy,
        pp: int,
        num_microbatches: int,
    ) -> None:
        """What sharding costs every micro-batch: ZeRO-3 gathers parameters forward and, as far as the engine has not
        kept them, backward; ZeRO-2 and 3 copy gradients into buffers and reduce them (ZeRO-2 the last time in the
        step)."""
        if strategy.zero < 2 or strategy.dp * strategy.cp == 1:
            return
        copied = (self._width + self._memory.gradient_bytes) * parameters.total / self._bandwidth
        backward = sum(backward_s.values())
        reduction = self._reduction(parameters, strategy)
        if strategy.zero == 2:
            every = (num_microbatches - 1) / num_microbatches
            backward_s[ZERO_COMM] = copied + every * self._unhidden_reduction(reduction, strategy, pp, backward)
            return
        gather = self._data_parallel(parameters, strategy, self._width)
        forward_s[ZERO_COMM] = self._exposed(gather, sum(forward_s.values()))
        again = 1.0
        if self.runtime.reused_parameters:
            again -= min(1.0, self.runtime.reused_parameters * strategy.tp / self._parameters)
        backward_s[ZERO_COMM] = copied + self._exposed(again * gather + reduction, backward)

    def _reduction(self, parameters: Parameters, strategy: Strategy) -> float:
        """Seconds to reduce the gradients of a layer over its replicas, if nothing hides it."""
        width = self._memory.gradient_bytes if self.capabilities.reduces_accumulated else self._width
        scatter = self._data_parallel(parameters, strategy, width)
        scatters = strategy.zero == 3 or (strategy.zero > 0 and self.capabilities.scatters_gradients)
        return scatter if scatters else 2 * scatter

    def _unhidden_reduction(self, seconds: float, strategy: Strategy, pp: int, backward: float) -> float:
        """What is left of a reduction of gradients beside a backward pass, where the engine overlaps them at all."""
        engine = self.capabilities
        overlaps = engine.overlap_gradient_reduce and strategy.zero in engine.overlap_zero
        overlaps = overlaps and not self._memory.holds_gradients_twice(strategy, pp)
        return self._exposed(seconds, backward) if overlaps and (pp == 1 or engine.overlap_with_pipeline) else seconds

    def _data_parallel(self, parameters: Parameters, strategy: Strategy, width: int) -> float:
        """Seconds to gather (or reduce-scatter) ``width`` bytes of every parameter of a layer over its replicas."""
        seconds = self._network.all_gather(width * parameters.dense, Group(strategy.dp * strategy.cp, strategy.tp))
        if parameters.expert:
            grid = strategy.ep * strategy.etp
            size = max(1, strategy.num_devices // grid)
            seconds += self._network.all_gather(width * parameters.expert, Group(size, grid))
        return seconds

    def _exposed(self, communication: float, compute: float) -> float:
        """What is left of communication that overlaps with ``compute`` seconds."""
        efficiency = self.efficiency
        hidden = efficiency.dp_overlap * compute
        return max(0.0, communication - hidden) + efficiency.dp_exposed * min(communication, hidden)

    def _tied_reduction(self, layer: LayerType, strategy: Strategy, pp: int) -> float:
        """Seconds to add up the gradients of a tied embedding on the first and the last stage, each of which has a copy
        (megatron/core/distributed/finalize_model_grads.py, deepspeed/runtime/pipe/engine.py)."""
        if pp == 1 or not self._tied_embedding or layer.kind is LayerKind.BLOCK:
            return 0.0
        rows = self.runtime.vocab_rows(self.model.vocab_size, strategy.tp) / strategy.tp
        pair = Group(2, self.cluster.num_devices - strategy.num_devices)
        return self._network.all_reduce(self._memory.gradient_bytes * rows * self.model.hidden_size, pair)

    def _step(
        self,
        layer: LayerType,
        parameters: Parameters,
        strategy: Strategy,
        pp: int,
        forward: float,
        backward: float,
    ) -> dict[str, float]:
        """Seconds once a step: gradient reduction, parameter gather, optimizer."""
        seconds: dict[str, float] = {}
        shard = strategy.dp * strategy.cp
        if shard > 1 and strategy.zero < 3:
            reduction = self._unhidden_reduction(self._reduction(parameters, strategy), strategy, pp, backward)
            sharded = self._memory.shards_optimizer(strategy, pp)
            gather = self._data_parallel(parameters, strategy, self._width) if sharded else 0.0
            if self.capabilities.overlap_param_gather:
                gather = self._exposed(gather, forward)
            seconds[DP_COMM] = reduction + gather
        if tied := self._tied_reduction(layer, strategy, pp):
            seconds[DP_COMM] = seconds.get(DP_COMM, 0.0) + tied
        updated = parameters.total
        if self._memory.shards_optimizer(strategy, pp):
            replicas = max(1, strategy.num_devices // (strategy.ep * strategy.etp))
            updated = parameters.dense / shard + parameters.expert / replicas
        cleared = self._memory.gradient_bytes * parameters.total
        seconds[OPTIMIZER] = (_OPTIMIZER_TRAFFIC * updated + cleared) / self._bandwidth
        return seconds

    # ---- edges --------------------------------------------------------------------------------------------------

    def reshard_seconds(self, source: Layout, target: Layout, *, microbatch: int) -> float:
        """Seconds to re-shard activations between neighbouring layers of one stage, forward and backward.

        A metric over the layouts of a stage: zero for equal layouts, symmetric, and never longer than a detour,
        because each of its terms is (see :mod:`.layout`); bandwidths do not depend on the layouts.

        Args:
            source: layout of the earlier layer.
            target: layout of the later layer.
            microbatch: samples of a micro-batch over all replicas.
        """
        if source == target:
            return 0.0
        key = (source, target)
        found = self._moves.get(key)
        if found is None:
            found = self._moves[key] = move(source, target, self._network.domain)
        network = self._network
        size = self._width * microbatch * self.job.seq_length * self.model.hidden_size
        seconds = found.rank * size * network.intra_seconds_per_byte
        # all devices of a domain share its way out
        seconds += found.domain * size / network.domain * network.inter_seconds_per_byte
        return seconds + 2 * network.latency

    def send_seconds(self, source: Layout, target: Layout, *, microbatch: int, pp: int) -> float:
        """Seconds to send activations to the next stage and their gradients back.

        Each device sends the border tensor, or its part of it with sequence parallelism, to the device W / pp ranks
        away (Megatron-LM before 2023 sends 1/tp of it in any case and gathers it over tp at the other end, arXiv
        2104.04473 section 4.1); other layouts re-shard there.
        """
        if pp == 1:
            return 0.0
        stride = max(1, self.cluster.num_devices // pp)
        whole = self._width * microbatch * self.job.seq_length * self.model.hidden_size / (source.dp * source.cp)
        scatters = self.runtime.scatters_borders and not source.sequence_parallel
        parts = source.tp if source.sequence_parallel or scatters else 1
        seconds = self._network.send(whole / parts, stride)
        if scatters:
            seconds += self._network.all_gather(whole, Group(source.tp, 1))
        return 2 * seconds + self.reshard_seconds(source, target, microbatch=microbatch)

    # ---- whole job ----------------------------------------------------------------------------------------------

    def reserved_bytes(self) -> float:
        """Bytes of a device that a plan must leave free besides the layers': CUDA context, NCCL, fragmentation."""
        networks = 2 if self.cluster.num_nodes > 1 else 1
        return _CONTEXT_BYTES + networks * _NCCL_BYTES + _FRAGMENTATION * self.cluster.device.memory_bytes

    def memory_fraction(self) -> float:
        """Part of a device's memory a plan may fill: what the measured error of predicted peaks leaves."""
        return 1 / (1 + self.memory_band())

    def time_band(self) -> float:
        """Half-width of the 80% band of a step time, as a fraction."""
        generation = self.efficiency.expert_band if self.model.moe is not None else self.efficiency.band
        return max(generation, self.runtime.band)

    def memory_band(self) -> float:
        """Half-width of the 80% band of peak memory, as a fraction."""
        return self.efficiency.expert_memory_band if self.model.moe is not None else self.efficiency.memory_band

    def buffer_bytes(self, strategy: Strategy, *, samples: int, virtual_stages: int = 1) -> float:
        """Persistent buffers of a stage that the framework's allocator holds, beyond those in ``transient_bytes``:
        workspaces of cuBLAS and TransformerEngine, its user buffers, the attention matrix of local layers, buckets of
        gradients, and what interleaving receives ahead (4 + v border tensors in all [Empirical])."""
        efficiency, runtime, job = self.efficiency, self.runtime, self.job
        handle = _DETERMINISTIC_WORKSPACE_MIB if runtime.deterministic else efficiency.cublas_workspace_mib
        workspace = 2 * handle * MIB
        if runtime.transformer_engine:
            grouped = self.model.moe is not None and runtime.grouped_experts
            workspace += (1 + (_GROUPED_STREAMS if grouped else 0)) * efficiency.engine_workspace_mib * MIB
        elif not job.flash_attention:
            heads = samples * self.model.num_heads / strategy.tp
            workspace += self._width * heads * job.seq_length**2 / strategy.cp
        if self._exchange.overlaps_tensor(strategy.tp if strategy.sequence_parallel else 1):
            tokens = samples * job.seq_length / strategy.cp
            workspace += _USER_BUFFERS * self._width * tokens * self.model.hidden_size
        if strategy.zero and not self._memory.holds_gradients_twice(strategy, pp=1):  # with ZeRO, pp is all one
            buckets = 1 if strategy.zero == 3 or not self.capabilities.overlap_gradient_reduce else 2
            # of gradients as they come; ZeRO-1's are of accumulated ones (zero/stage_1_and_2.py:1253)
            width = self._memory.gradient_bytes if strategy.zero == 1 else self._width
            workspace += buckets * width * runtime.gradient_bucket
        if virtual_stages > 1:
            workspace += (4 + virtual_stages - _BORDER_BUFFERS) * self.border_bytes(strategy, samples)
        return workspace

    def uncut_states(self, layers: Sequence[tuple[LayerType, Strategy, int]], *, pp: int) -> float:
        """What the allocator counts beyond the states of a stage's layers, each of them so many times."""
        return self._memory.uncut_states(layers, shares_embedding=self._tied_embedding and pp == 1)

    def uncut_activations(self, layer: LayerType, strategy: Strategy, *, samples: int, times: int) -> float:
        """What the allocator counts beyond the activations of so many equal layers for one micro-batch."""
        return self._memory.uncut_activations(layer, strategy, samples, times)

    def pipeline_bytes(self, strategy: Strategy, *, samples: int, pp: int) -> float:
        """Receive and send buffers of a stage, which ``transient_bytes`` contains."""
        return _BORDER_BUFFERS * self.border_bytes(strategy, samples) if pp > 1 else 0.0

    def border_bytes(self, strategy: Strategy, samples: int) -> float:
        """Bytes of one hidden-width tensor of a micro-batch on one device."""
        sp = strategy.tp if strategy.sequence_parallel else 1
        return self._width * samples * self.job.seq_length / strategy.cp * self.model.hidden_size / sp

    def step_flops(self) -> float:
        """Model FLOPs of one optimizer step: 6 for each parameter of a matrix and token, and attention (causal:
        half of s^2), without recomputation (arXiv 2104.04473 equation 3, appendix)."""
        model, job = self.model, self.job
        head, value = head_widths(model)
        flops = 0.0
        for layer in build_graph(model).layers:
            if layer.type.kind is LayerKind.BLOCK:
                seq = job.sequence(encoder=layer.type.encoder)
                pairs = attended(layer.type, seq) + (seq * job.sequence(encoder=True) if layer.type.cross else 0.0)
                flops += 6 * job.global_batch * seq * self._active_parameters(layer.type)
                flops += 6 * job.global_batch * pairs * model.num_heads * (head + value)
        return flops + 6 * job.global_batch * job.seq_length * model.vocab_size * model.hidden_size

    def _active_parameters(self, layer: LayerType) -> float:
        """Parameters a token passes through."""
        total = float(layer_parameters(self.model, layer))
        moe = self.model.moe
        if layer.moe and moe is not None:
            fan = 3 if self.model.gated_mlp else 2
            idle = moe.num_experts - moe.top_k
            total -= idle * fan * moe.expert_ffn_size * self.model.hidden_size
        return total
