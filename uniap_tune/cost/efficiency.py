"""Efficiency constants of the cost model: one small set for each GPU generation, read from ``data/efficiency``.

A generation without a file of its own gets ``generic``, with a wider error band. Every number in those files cites
its source or is marked [Empirical]; ``docs/explanation/accuracy.md`` shows how they were fitted.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from uniap_tune.spec import Device, DType

GENERIC = "generic"
# 16-bit FLOP/s of one multiprocessor: A10G has 0.9e12, RTX 4090 1.3e12, V100 1.6e12, A100 2.9e12.
_FED = 1.4e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """How much of its nominal figures a GPU generation reaches in training.

    Attributes:
        generation: the file it came from.
        gemm: fraction of peak FLOP/s of a large matrix multiplication at the clocks the power limit leaves.
        gemm_fed: the same where the units of a multiprocessor are so slow (``_FED``) that registers and shared memory
            keep up: GPUs that accumulate in FP32 at half rate, or without tensor cores.
        efficient_flops_per_watt: peak 16-bit FLOP/s a watt of the power limit up to which clocks hold under load.
        power_exponent: how clocks fall beyond it: with this power of the ratio.
        quantized: for each 8- and 4-bit format, its large-GEMM fraction of that format's peak at those clocks; above
            one where clocks are higher than with 16 bits, because a FLOP takes less power.
        gemm_wave_exponent: how much of the idle part of the last wave of tiles costs time (1: all of it).
        gemm_k_ramp: elements of k that prologue and epilogue of a tile cost.
        misaligned: times as long a GEMM takes whose rows are not multiples of 16 bytes.
        ragged: times as long it takes where they are, but not of 128 bytes.
        memory: fraction of the nominal memory bandwidth that element-wise kernels reach.
        flash: fraction of peak FLOP/s of fused attention, forward.
        flash_backward: fraction of peak FLOP/s of fused attention, backward.
        flash_previous: rate of fused attention written for the generation before (FlashAttention 2 on Hopper), relative
            to kernels that use the generation's own instructions.
        link: fraction of the intra-domain link's nominal bandwidth that collectives reach.
        network: the same for the network between domains.
        collective_latency_s: seconds a step of a collective adds to the link's latency.
        tp_exposed: part of the tensor-parallel communication that stays where GEMMs overlap with it
            (``Runtime.overlap_tensor``).
        dp_overlap: part of backward (forward) behind which gradient reduction (parameter gather) hides.
        dp_exposed: part of data-parallel communication that slows compute even when hidden.
        cublas_workspace_mib: workspace of one cuBLAS handle; the forward and the backward thread have one each.
        engine_workspace_mib: workspace of TransformerEngine's GEMMs.
        attention_copies: fused attention works on (batch, sequence) order and keeps a copy of its output in the
            order of the layer, unless the micro-batch is one sample (FlashAttention; cuDNN's takes either order).
        transposed_weights: FP8 multiplications need a transposed copy of the weights.
        band: half-width of the 80% error band of a step time, as a fraction, from cross-validation.
        memory_band: the same for memory.
        expert_band, expert_memory_band: the two for models with experts.
    """

    generation: str
    gemm: float
    gemm_fed: float
    efficient_flops_per_watt: float
    power_exponent: float
    quantized: Mapping[DType, float]
    gemm_wave_exponent: float
    gemm_k_ramp: float
    misaligned: float
    ragged: float
    memory: float
    flash: float
    flash_backward: float
    flash_previous: float
    link: float
    network: float
    collective_latency_s: float
    tp_exposed: float
    dp_overlap: float
    dp_exposed: float
    cublas_workspace_mib: float
    engine_workspace_mib: float
    attention_copies: bool
    transposed_weights: bool
    band: float
    memory_band: float
    expert_band: float
    expert_memory_band: float

    def large_gemm(self, device: Device) -> float:
        """Fraction of a device's peak FLOP/s that a large matrix multiplication reaches at the clocks it leaves."""
        peak = _half_peak(device)
        return self.gemm if peak is None or peak / device.num_sms > _FED else self.gemm_fed

    def clocks(self, device: Device) -> float:
        """Clocks under the load of matrix multiplications, as a fraction of the boost clocks of the data sheet."""
        peak = _half_peak(device)
        if device.watts is None or peak is None:
            return 1.0
        return math.pow(min(1.0, self.efficient_flops_per_watt * device.watts / peak), self.power_exponent)


def _half_peak(device: Device) -> float | None:
    return device.peak_flops.get(DType.BF16) or device.peak_flops.get(DType.FP16)


def efficiency_for(device: Device) -> Efficiency:
    """The constants of a device's generation, or the generic ones."""
    return load_efficiency(device.generation if device.generation in generations() else GENERIC)


@cache
def generations() -> frozenset[str]:
    """Generations that have constants of their own."""
    names = (entry.name for entry in _folder().iterdir())
    return frozenset(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


@cache
def load_efficiency(generation: str) -> Efficiency:
    """Reads ``data/efficiency/<generation>.toml``; keys it leaves out are those of ``generic.toml``."""
    values = _read(GENERIC)
    own = _read(generation)
    quantized = {**values.pop("quantized"), **own.pop("quantized", {})}
    values.update(own)
    known = {field.name for field in fields(Efficiency)}
    numbers = {key: value for key, value in values.items() if key in known}
    return Efficiency(
        generation=generation,
        quantized=MappingProxyType({DType(name): value for name, value in quantized.items()}),
        **numbers,
    )


def _folder() -> Any:
    return resources.files("uniap_tune.data") / "efficiency"


def _read(generation: str) -> dict[str, Any]:
    return tomllib.loads((_folder() / f"{generation}.toml").read_text(encoding="utf-8"))
