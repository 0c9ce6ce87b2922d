"""Seconds of computation: a roofline for every operator of a layer.

Matrix multiplications take the larger of FLOPs at a shape-dependent rate and bytes at memory bandwidth; everything
element-wise takes bytes at memory bandwidth; and a layer cannot run faster than its kernels are launched.

Symbols: b samples, s sequence length, t = b * s / cp tokens of the rank, h hidden size, q and k widths of query and
key heads, f MLP width, a heads, sp = tp with sequence parallelism, else 1. FLOPs of the linear layers and of
attention are those of arXiv 2104.04473 (appendix), causal attention counting half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from uniap_tune.cost import eager
from uniap_tune.cost.efficiency import Efficiency
from uniap_tune.cost.operators import (
    Gemm,
    Shape,
    attended,
    attention_gemms,
    cross_attention_gemms,
    fuses_softmax,
    head_widths,
    latent_gemms,
    mlp_gemms,
    moe_gemms,
)
from uniap_tune.cost.runtime import CORE_ATTENTION, EXPERTS, LATENT_UP, MLP, SHARED_EXPERTS, Runtime
from uniap_tune.graph import LayerKind, LayerType, block_type
from uniap_tune.spec import Device, DType, Job, Model, Position, QkNorm

_TILE = 128  # rows and columns of an output tile of the tensor-core GEMM kernels
# Bytes an element of the attention matrix moves: softmax writes all and reads what is not masked, backward two such
# matrices [Empirical: half as much again as 16 bits each]; dropout reads and writes 16 bits and a mask each way.
_SOFTMAX_WRITTEN = 3.0
_SOFTMAX_READ = 3.0
_DROPOUT_BYTES = 5.0
# How much more softmax moves where scaling and masking are kernels of their own [Empirical]: A100 at 4096 tokens in the
# profiles below.
_SEPARATE_SOFTMAX = 1.75
# How much longer the multiplications of an attention core take than a large one of their FLOPs [Empirical]: scores and
# context of V100, A10G, L4 and A100, profiled operator by operator (Dazz993/Mist, benchmark/superscaler/results-ref).
_BATCHED = 1.4
_MISALIGNED_HEADS = 6.0  # heads whose rows are no multiples of 16 bytes [Empirical]: bigscience, tr11-176B chronicles
# Bytes an element of a linear layer's input (output gradient) moves to be quantized: read as 16 bits, written as 8 bits
# in rows and columns; the input's columns are made for backward from the narrow copy.
_CAST_FORWARD = 5.0
_CAST_BACKWARD = 4.0
# Elements that a norm moves for each of its input, an activation function, gated or plain, for each of its output, and
# rotary embeddings for each of queries and keys, as one kernel: forward and backward.
_NORM = (2.0, 3.0)
_GATED = (3.0, 5.0)
_PLAIN = (2.0, 3.0)
_ROTARY = (2.0, 2.0)
# Launches that one collective costs: the framework's call, the stream's events, NCCL's kernel [Empirical].
_COLLECTIVE_LAUNCHES = 2.5
# Part of an expert layer's launches that nothing hides, because the CPU waits for the GPU to count the tokens of each
# expert before it can launch their multiplications [Empirical].
_EXPERT_WAIT = 0.25
_LAUNCH_NORM = 7.5  # exponent of the smooth maximum of GPU time and launch time [Empirical]
_ALIGNED = 8  # 16-bit elements in 16 bytes (NVIDIA, Matrix Multiplication Background, section 4)
_WHOLE_LINES = 64  # 16-bit elements in 128 bytes (the same, table 1, for A100; arXiv 2401.14489 section VI)
_HALF = (DType.FP16, DType.BF16)


@dataclass(frozen=True, slots=True)
class Compute:
    """GPU seconds of one micro-batch of one layer on one rank, as if no kernel ever waited to be launched.

    ``core`` is the attention core's part of forward, ``again`` what selective recomputation repeats; ``kernels`` are
    launched forward, a quarter more backward; ``waits``: doublings of ranks over all collectives each way.
    """

    forward: float
    backward: float
    core: float
    kernels: float
    again: float = 0.0
    waits: float = 0.0


@dataclass(frozen=True, slots=True)
class _Attention:
    """The attention core: FLOPs of a forward pass, bytes each way, seconds per FLOP each way."""

    forward: float
    backward: float

    def plus(self, other: _Attention) -> _Attention:
        """Both, one after the other."""
        return _Attention(self.forward + other.forward, self.backward + other.backward)


class ComputeModel:
    """Prices the computation of layers on one device type."""

    def __init__(self, model: Model, device: Device, job: Job, efficiency: Efficiency, runtime: Runtime) -> None:
        self._model = model
        self._job = job
        self._runtime = runtime
        self._efficiency = efficiency
        self._launch_s = runtime.launch_s * device.host
        dtype = job.precision.compute
        self._clocks = clocks = efficiency.clocks(device)
        peak = clocks * _peak(device, DType.FP32 if dtype is DType.FP32 else _half(device, dtype))
        self._wide = peak * efficiency.large_gemm(device)
        self._narrow = self._wide
        self._is_quantized = dtype not in (DType.FP32, *_HALF) and dtype in device.peak_flops
        if self._is_quantized:
            self._narrow = clocks * _peak(device, dtype) * efficiency.quantized[dtype]
        self._attention_peak = peak
        self._bandwidth = device.memory_bandwidth * efficiency.memory
        self._sms = device.num_sms
        self._width = 4 if dtype is DType.FP32 else 2
        self._repeated = runtime.recompute_modules
        self._norm, self._activation, self._rotary = _moved(model, operators=runtime.eager)
        self._cache: dict[tuple[LayerType, Shape], Compute] = {}

    def layer(self, layer: LayerType, shape: Shape) -> Compute:
        """Forward, backward and attention-core seconds of one micro-batch (no recomputation, no communication)."""
        key = (layer, shape)
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._price(layer, shape)
        return found

    def _price(self, layer: LayerType, shape: Shape) -> Compute:
        if layer.kind is LayerKind.EMBEDDING:
            return self._embedding(shape)
        if layer.kind is LayerKind.HEAD:
            return self._head(shape)
        return self._block(layer, shape)

    def _block(self, layer: LayerType, shape: Shape) -> Compute:
        model = self._model
        tokens = shape.samples * self._job.sequence(encoder=layer.encoder) / shape.cp
        gemms = attention_gemms(model, tokens, shape.tp)
        if layer.cross:
            read = shape.samples * self._job.sequence(encoder=True) / shape.cp
            gemms += cross_attention_gemms(model, tokens, read, shape.tp)
        experts = layer.moe and model.moe is not None
        gemms += moe_gemms(model, tokens, shape) if experts else mlp_gemms(model, tokens, shape.tp, model.ffn_size)
        core = self._attention(layer, shape)
        if layer.cross:
            core = core.plus(self._cross_attention(shape))
        forward_bytes, backward_bytes = self._block_bytes(layer, tokens, shape)
        forward = sum(self._gemm(g.m, g.n, g.k, g) for g in gemms)
        backward = sum(self._gemm(g.m, g.k, g.n, g) + self._gemm(g.n, g.k, g.m, g, gradient=True) for g in gemms)
        forward += core.forward + forward_bytes / self._bandwidth
        backward += core.backward + backward_bytes / self._bandwidth
        kernels = self._kernels(len(gemms), shape, experts=experts)
        again = self._again(layer, tokens, shape) + (core.forward if CORE_ATTENTION in self._repeated else 0.0)
        return Compute(forward, backward, core.forward, kernels, again, 2 * math.log2(shape.tp))

    def _again(self, layer: LayerType, tokens: float, shape: Shape) -> float:
        """Forward seconds of the modules that selective recomputation names, without the attention core; norms and
        activations go with their neighbours' bytes and count for nothing."""
        model, repeated = self._model, self._repeated
        gemms: list[Gemm] = []
        if LATENT_UP in repeated and model.mla is not None:
            gemms += latent_gemms(model, model.mla, tokens, shape.tp)
        if layer.moe and model.moe is not None:
            if EXPERTS in repeated:
                gemms += moe_gemms(model, tokens, shape)
            elif SHARED_EXPERTS in repeated and model.moe.shared_ffn_size:
                gemms += mlp_gemms(model, tokens, shape.tp, model.moe.shared_ffn_size)
        elif MLP in repeated:
            gemms += mlp_gemms(model, tokens, shape.tp, model.ffn_size)
        return sum(self._gemm(g.m, g.n, g.k, g) for g in gemms)

    def _kernels(self, gemms: int, shape: Shape, *, experts: bool) -> float:
        """Kernels of a block's forward pass, in units of one launch."""
        kernels = 10.0 + 2 * gemms
        if experts and self._model.moe is not None:
            # routing, permutation and dispatch; then the GEMMs of the local experts, many in one call [Empirical]
            kernels += 10 + self._model.moe.num_experts / shape.ep
        if not self._runtime.fused_kernels:
            kernels *= 2  # biases, dropout, additions and transposes on their own [Empirical]
        if not self._job.flash_attention:
            kernels += 4 if self._fuses_softmax(shape, self._job.seq_length, self._job.seq_length) else 24
        collectives = 0 if shape.tp == 1 else 2 if shape.sp == 1 else 4
        return kernels + _COLLECTIVE_LAUNCHES * collectives

    def _fuses_softmax(self, shape: Shape, rows: int, keys: int) -> bool:
        batches = shape.samples * self._model.num_heads // shape.tp
        return fuses_softmax(self._runtime.softmax_length, batches, rows, keys)

    def _gemm(self, m: float, n: float, k: float, gemm: Gemm, *, gradient: bool = False) -> float:
        """Seconds of one GEMM, times its count. ``gradient``: the result accumulates in fp32 (weight gradients)."""
        efficiency = self._efficiency
        waves = math.ceil(m / _TILE) * math.ceil(n / _TILE) / self._sms
        # the last wave of tiles runs with idle SMs; smaller tiles and split-k win part of them back
        idle = math.pow(min(math.ceil(waves) / waves, 4.0), efficiency.gemm_wave_exponent)
        rate = self._narrow if gemm.quantized else self._wide
        # filling and draining a tile takes a fixed time, so faster formats lose more of their rate to it
        ramp = efficiency.gemm_k_ramp * rate / self._wide
        compute = 2.0 * m * n * k * idle * (1 + ramp / k) * self._ragged(gemm) / rate
        size = self._width * (m * k + k * n) + (8 if gradient else self._width) * m * n
        return gemm.count * max(compute, size / self._bandwidth)

    def _ragged(self, gemm: Gemm) -> float:
        """How much longer a GEMM takes because rows of its matrices end within 16 bytes, or within 128."""
        if gemm.n % _ALIGNED or gemm.k % _ALIGNED:
            return self._efficiency.misaligned
        return self._efficiency.ragged if gemm.n % _WHOLE_LINES or gemm.k % _WHOLE_LINES else 1.0

    def _attention(self, layer: LayerType, shape: Shape) -> _Attention:
        seq = self._job.sequence(encoder=layer.encoder)
        return self._core(shape, seq, seq, attended(layer, seq))

    def _cross_attention(self, shape: Shape) -> _Attention:
        """Every token of the decoder attends to every one of the encoder."""
        rows, seq = self._job.seq_length, self._job.sequence(encoder=True)
        return self._core(shape, rows, seq, float(rows * seq))

    def _core(self, shape: Shape, rows: int, seq: int, pairs: float) -> _Attention:
        """The core of ``rows`` queries of a sample over ``seq`` keys, of which ``pairs`` are not masked."""
        model = self._model
        head_width, value_width = head_widths(model)
        heads = shape.samples * model.num_heads / shape.tp
        area = pairs / shape.cp
        if not self._job.flash_attention:
            softmax = 1.0 if self._fuses_softmax(shape, rows, seq) else _SEPARATE_SOFTMAX
            return self._unfused(heads, rows / shape.cp, seq, (head_width, value_width), pairs / (rows * seq), softmax)
        flops = 2.0 * heads * area * (head_width + value_width)
        efficiency = self._efficiency
        peak = self._attention_peak * self._runtime.flash_share
        peak *= efficiency.flash_previous if self._runtime.previous_attention else 1.0
        return _Attention(flops / (peak * efficiency.flash), 2.5 * flops / (peak * efficiency.flash_backward))

    def _unfused(
        self, heads: float, rows: float, seq: int, widths: tuple[int, int], seen: float, softmax: float
    ) -> _Attention:
        """Batched GEMMs over all pairs, and by bytes dropout and softmax, of the part ``seen`` that is not masked and
        ``softmax`` times what one kernel moves."""
        scores = Gemm(rows, seq, widths[0], heads, quantized=False)
        context = Gemm(rows, widths[1], seq, heads, quantized=False)
        dropout = _DROPOUT_BYTES if self._model.attention_dropout else 0.0
        area = heads * rows * seq / self._bandwidth
        forward = self._batched(scores) + self._batched(context)
        return _Attention(
            forward + (softmax * (_SOFTMAX_WRITTEN + _SOFTMAX_READ * seen) + dropout) * area,
            2 * forward + (softmax * (_SOFTMAX_WRITTEN + 2 * _SOFTMAX_READ * seen) + dropout) * area,
        )

    def _batched(self, gemm: Gemm) -> float:
        tiles = math.ceil(gemm.m / _TILE) * math.ceil(gemm.n / _TILE) * gemm.count / self._sms
        idle = math.pow(math.ceil(tiles) / tiles, self._efficiency.gemm_wave_exponent)
        compute = 2 * gemm.m * gemm.n * gemm.k * gemm.count * idle / self._wide
        compute *= _BATCHED * (1 + self._efficiency.gemm_k_ramp / gemm.k)
        compute *= _MISALIGNED_HEADS if min(gemm.n, gemm.k) % _ALIGNED else 1.0
        size = self._width * gemm.count * (gemm.m * gemm.k + gemm.k * gemm.n + gemm.m * gemm.n)
        return max(compute, size / self._bandwidth)

    def _block_bytes(self, layer: LayerType, tokens: float, shape: Shape) -> tuple[float, float]:
        """Bytes through memory of everything element-wise, forward and backward.

        Forward, in elements: each norm reads and writes h; each residual addition reads two and writes one h; the
        activation reads f (2f gated) and writes f; rotary reads and writes q + k. Backward a norm reads two and
        writes one, the residual's gradient is added, the activation reads its input again. Operators of PyTorch
        read and write what is between too.
        """
        model = self._model
        hidden = tokens * model.hidden_size / shape.sp
        gate = 2 if model.gated_mlp else 1
        norm, activation, rotary = self._norm, self._activation, self._rotary
        if layer.moe and model.moe is not None:
            moe = model.moe
            routed = tokens * moe.top_k * shape.etp / shape.tp
            active = routed * moe.expert_ffn_size / shape.etp + tokens * moe.shared_ffn_size / shape.tp
            permuted = 4 * routed * model.hidden_size  # gather and scatter of the routed tokens, read and write
        else:
            active, permuted = tokens * model.ffn_size / shape.tp, 0.0
        heads = tokens * (model.q_width + model.kv_width) / shape.tp
        turned = heads if model.position is Position.ROPE else 0.0
        dropout = 2 * (0.5 * hidden) if model.hidden_dropout else 0.0
        norms = model.norms_per_layer * hidden + (heads if model.qk_norm is not QkNorm.NONE else 0.0)
        forward = norm[0] * norms + 6 * hidden + activation[0] * active + rotary[0] * turned + dropout + permuted
        backward = norm[1] * norms + 8 * hidden + activation[1] * active + rotary[1] * turned + dropout + permuted
        backward += tokens * eager.gradients(model) if self._runtime.eager else 0.0
        forward, backward = self._width * forward, self._width * backward
        if self._is_quantized:
            inputs = 2 * tokens * model.hidden_size + tokens * model.q_width / shape.tp + active
            outputs = 2 * tokens * model.hidden_size + gate * active
            outputs += tokens * (model.q_width + 2 * model.kv_width) / shape.tp
            forward += self._runtime.cast_traffic * _CAST_FORWARD * inputs
            backward += self._runtime.cast_traffic * _CAST_BACKWARD * outputs
        return forward, backward

    def _embedding(self, shape: Shape) -> Compute:
        size = self._width * shape.samples * self._job.seq_length / shape.cp * self._model.hidden_size
        forward, backward = 3 * size / self._bandwidth, 4 * size / self._bandwidth
        return Compute(forward, backward, 0.0, 6.0)

    def _head(self, shape: Shape) -> Compute:
        model = self._model
        tokens = shape.samples * self._job.seq_length / shape.cp
        rows = self._runtime.vocab_rows(model.vocab_size, shape.tp)
        logits = tokens * rows / self._runtime.embedding_parts(shape.tp)
        gemm = Gemm(tokens, rows / self._runtime.output_parts(shape.tp), model.hidden_size, quantized=False)
        loss = self._runtime.loss.moved * logits / self._bandwidth / 2
        norm = self._width * tokens * model.hidden_size / shape.sp / self._bandwidth
        forward = self._gemm(gemm.m, gemm.n, gemm.k, gemm) + loss + self._norm[0] * norm
        backward = self._gemm(gemm.m, gemm.k, gemm.n, gemm) + self._gemm(gemm.n, gemm.k, gemm.m, gemm, gradient=True)
        # gradients of logits are all but zero: multiplying them takes so little power that clocks hold
        backward *= self._clocks
        head = Compute(forward, backward + loss + self._norm[1] * norm, 0.0, 12.0)
        return self._with_extra_predictions(head, tokens, shape) if model.mtp_layers else head

    def _with_extra_predictions(self, head: Compute, tokens: float, shape: Shape) -> Compute:
        """A head with multi-token prediction (arXiv 2412.19437 section 2.2): each module joins two hidden vectors,
        runs a block like the last one, and takes the output projection and the loss again."""
        model = self._model
        join = Gemm(tokens, model.hidden_size / shape.tp, 2 * model.hidden_size)
        block = self._block(block_type(model, model.num_layers - 1), shape)
        modules = model.mtp_layers
        forward = block.forward + self._gemm(join.m, join.n, join.k, join)
        backward = block.backward + 2 * self._gemm(join.m, join.k, join.n, join)
        return Compute(
            head.forward + modules * (head.forward + forward),
            head.backward + modules * (head.backward + backward),
            0.0,
            head.kernels + modules * (head.kernels + block.kernels + 2),
        )

    def launched(self, gpu: float, kernels: float, *, fetched: float, waits: float, experts: bool) -> float:
        """GPU seconds, communication included and a start-up for every kernel, or the CPU's launches, with what it does
        to fetch parameters, where they take longer; in between a smooth maximum. Collectives wait for the last rank
        to launch them, unless the GPUs have work queued; a layer with experts also waits for part of its launches."""
        gpu += kernels * self._runtime.kernel_s
        if self._runtime.cuda_graphs:
            return gpu
        floor = (kernels + fetched) * self._launch_s
        gpu += _EXPERT_WAIT * floor if experts else 0.0
        gpu += waits * self._runtime.rank_wait_s * min(1.0, floor / gpu)
        high, low = (gpu, floor) if gpu > floor else (floor, gpu)
        return high * math.pow(1 + math.pow(low / high, _LAUNCH_NORM), 1 / _LAUNCH_NORM)


_Moved = tuple[float, float]


def _moved(model: Model, *, operators: bool) -> tuple[_Moved, _Moved, _Moved]:
    """Elements that norm, activation function and rotary embeddings move, each forward and backward."""
    if not operators:
        return _NORM, _GATED if model.gated_mlp else _PLAIN, _ROTARY
    return eager.NORM if eager.has_rms_norm(model) else _NORM, eager.activation(model) or _PLAIN, eager.ROTARY


def _peak(device: Device, dtype: DType) -> float:
    return device.peak_flops.get(dtype) or max(device.peak_flops.values())


def _half(device: Device, dtype: DType) -> DType:
    """The 16-bit format of a job: its own, or for 8- and 4-bit jobs the wide format of attention and head."""
    wanted = dtype if dtype in _HALF else DType.BF16
    return next((d for d in (wanted, *_HALF, DType.FP32) if d in device.peak_flops), DType.FP32)
