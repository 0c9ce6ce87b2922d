"""In which dtypes an engine keeps gradients and master weights, and what DeepSpeed makes of the optimizer for that.

DeepSpeed 0.19.8 picks its optimizer by dtypes, ZeRO stage and pipeline (runtime/engine.py:2294). Its BF16_Optimizer
(runtime/bf16_optimizer.py) shards states over the replicas whatever the ZeRO stage is, and holds gradients twice: as
the backward pass makes them, and accumulated. Kept against the engine in ``tests/conformance/test_deepspeed_rank.py``.
"""

from __future__ import annotations

from uniap_tune.spec import DType, Job, OptimizerName
from uniap_tune.strategy import Capabilities, Target


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


def master_bytes(job: Job, capabilities: Capabilities, zero: int) -> int:
    """Bytes of the copy of a parameter that the optimizer updates: fp32 beside narrower parameters, and in DeepSpeed's
    ZeRO beside fp32 ones too (runtime/zero: ``single_partition_of_fp32_groups``, ``fp32_partitioned_groups_flat``)."""
    precision = job.precision
    copies = precision.compute is DType.FP32 and precision.master_weights and zero > 0
    return 4 if copies and capabilities.target is Target.DEEPSPEED else precision.master_bytes


def zero_refusal(job: Job, capabilities: Capabilities, zero: int, *, tied_pipeline: bool = False) -> str:
    """Why the engine cannot train the job at a ZeRO stage; empty: it can. ``tied_pipeline``: the first and the last of
    several stages share the embedding."""
    target = capabilities.target
    if target is Target.MEGATRON and zero and job.optimizer is not OptimizerName.ADAM:
        # megatron/core/optimizer/distrib_optimizer.py, "Only Adam and HybridDeviceOptimizer currently supported"
        return "Megatron's distributed optimizer, which is what ZeRO 1 to 3 take, runs Adam alone"
    if target is not Target.DEEPSPEED or job.precision.param_bytes == 4 or gradient_bytes(job, capabilities) == 2:
        return ""
    if zero and tied_pipeline and job.precision.compute is DType.FP16:
        # pipe/engine.py:283 looks for gradients where this optimizer keeps none
        return "DeepSpeed does not add up the gradients of a tied embedding where fp16 gradients accumulate in fp32"
    if zero:
        return ""
    return "without ZeRO DeepSpeed accumulates gradients in the compute dtype, and the job asks for fp32 gradients"


def holds_gradients_twice(job: Job, capabilities: Capabilities, *, zero: int, pp: int) -> bool:
    """Whether the engine's optimizer is DeepSpeed's BF16_Optimizer."""
    if capabilities.target is not Target.DEEPSPEED or job.precision.compute is not DType.BF16:
        return False
    if not job.precision.master_weights:  # the host has the states (engine.py:2305)
        return False
    return (zero == 0 and pp > 1) or (zero == 1 and gradient_bytes(job, capabilities) == 4)


def shards_alone(job: Job, capabilities: Capabilities, *, zero: int, pp: int) -> bool:
    """Whether a ZeRO stage below 3 differs from ZeRO 0 with a single replica too: by the optimizer it brings."""
    if not 0 < zero < 3:
        return False
    return bool(zero_refusal(job, capabilities, 0)) or holds_gradients_twice(job, capabilities, zero=0, pp=pp)
