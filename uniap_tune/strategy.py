"""How one layer is spread over the devices of its stage, and what each target can run.

An *axis* is a way to split work over devices: tp (tensor), cp (context), dp (data), ep (expert).
``tp * cp * dp`` is the number of devices of a pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from uniap_tune.spec import Recompute


class Target(StrEnum):
    """The engine a plan is for."""

    MEGATRON = "megatron"
    DEEPSPEED = "deepspeed"
    ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Layout:
    """How activations lie on a stage's devices between layers; re-sharding depends on nothing else."""

    tp: int
    cp: int
    dp: int
    sequence_parallel: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One layer's parallel strategy.

    ``zero``: 0 replicates all states, 1 shards optimizer states, 2 also gradients, 3 also parameters, over
    dp * cp ranks (arXiv 1910.02054). ``sequence_parallel`` shards norms, dropout and residuals over tp
    (arXiv 2205.05198). ``ep`` and ``etp`` are the experts' own grid: ``ep * etp`` ranks hold one set of experts, and
    the stage holds ``tp * cp * dp / (ep * etp)`` such sets.
    """

    tp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    zero: int = 0
    recompute: Recompute = Recompute.NONE
    sequence_parallel: bool = False

    @property
    def num_devices(self) -> int:
        """Devices of the stage."""
        return self.tp * self.cp * self.dp

    @property
    def layout(self) -> Layout:
        """The activation layout at this layer's borders."""
        return Layout(tp=self.tp, cp=self.cp, dp=self.dp, sequence_parallel=self.sequence_parallel)

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Sort key of the tie-break: less recompute, lower ZeRO, lower tp, cp, ep and etp first."""
        return (_RECOMPUTE_ORDER[self.recompute], self.zero, self.tp, self.cp, self.ep, self.etp)

    def describe(self) -> str:
        """Short form for tables: ``"tp4 dp2 z1 rc-full"``."""
        parts = [f"tp{self.tp}", f"dp{self.dp}"]
        if self.cp > 1:
            parts.append(f"cp{self.cp}")
        if self.ep > 1:
            parts.append(f"ep{self.ep}")
        if self.etp > 1:
            parts.append(f"etp{self.etp}")
        parts.append(f"z{self.zero}")
        if self.recompute is not Recompute.NONE:
            parts.append(f"rc-{self.recompute}")
        return " ".join(parts)


_RECOMPUTE_ORDER = {Recompute.NONE: 0, Recompute.SELECTIVE: 1, Recompute.FULL: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a target can run; the search obeys it (targets are constraints).

    Attributes:
        uniform: one (tp, cp, dp, zero) for all layers of the model.
        zero: ZeRO stages without a pipeline.
        zero_with_pipeline: ZeRO stages with pp > 1.
        tensor_with_pipeline: tp > 1 and pp > 1 together.
        sequence_parallel: tensor parallelism shards the sequence too.
        context_parallel: cp > 1 at all.
        recompute: modes it offers.
        leading_recompute: full recompute of the first N blocks of every stage (Megatron's ``block``).
        expert_parallel: experts have a grid of their own (ep > 1 at all).
        interleaving: several model chunks on a stage (virtual stages, arXiv 2104.04473 section 2.2).
        gradient_bytes: bytes of an accumulated gradient in bf16/fp16 training.
        overlap_gradient_reduce: gradients are reduced behind the backward pass, as far as the engine can: in a
            pipeline only with ``overlap_with_pipeline``, by ZeRO stage if it is one of ``overlap_zero``.
        overlap_param_gather: ZeRO-1 and 2 gather parameters behind the next forward pass.
        scatters_gradients: ZeRO-1 and 2 reduce gradients by a reduce-scatter; else by an all-reduce, of which a rank
            keeps its part.
        reduces_accumulated: gradients are reduced in the dtype they accumulate in; else in the compute dtype.
    """

    target: Target
    uniform: bool
    zero: frozenset[int]
    zero_with_pipeline: frozenset[int]
    tensor_with_pipeline: bool
    sequence_parallel: bool
    context_parallel: bool
    recompute: frozenset[Recompute]
    leading_recompute: bool
    gradient_bytes: int
    expert_parallel: bool = False
    interleaving: bool = False
    overlap_gradient_reduce: bool = True
    overlap_with_pipeline: bool = True
    overlap_zero: frozenset[int] = frozenset({0, 1, 2, 3})
    overlap_param_gather: bool = True
    scatters_gradients: bool = True
    reduces_accumulated: bool = True


CAPABILITIES: dict[Target, Capabilities] = {
    # Megatron-LM: one ProcessGroupCollection for the model; the distributed optimizer is ZeRO-1 over dp*cp;
    # Megatron-FSDP adds optim_grads (2) and optim_grads_params (3). Gradients accumulate in fp32.
    Target.MEGATRON: Capabilities(
        target=Target.MEGATRON,
        uniform=True,
        zero=frozenset({0, 1, 2, 3}),
        zero_with_pipeline=frozenset({0, 1}),
        tensor_with_pipeline=True,
        sequence_parallel=True,
        context_parallel=True,
        recompute=frozenset(Recompute),
        leading_recompute=True,
        gradient_bytes=4,
        expert_parallel=True,
        interleaving=True,
    ),
    # DeepSpeed 0.19.8: AutoTP with PipelineModule does not work (engine.py:957); pipelines need ZeRO <= 1
    # (pipe/engine.py:76); no sequence parallelism inside AutoTP. Without ZeRO and in a pipeline gradients are reduced
    # after the backward pass (engine.py:3095, 2664); ZeRO-1 and 2 all-reduce them, as use_multi_rank_bucket_allreduce
    # says by default (zero/stage_1_and_2.py:1695), and gather parameters before the step ends (3155). All reductions
    # are in the compute dtype, whatever gradients accumulate in (engine.py:1719).
    Target.DEEPSPEED: Capabilities(
        target=Target.DEEPSPEED,
        uniform=True,
        zero=frozenset({0, 1, 2, 3}),
        zero_with_pipeline=frozenset({0, 1}),
        tensor_with_pipeline=False,
        sequence_parallel=False,
        context_parallel=False,
        recompute=frozenset({Recompute.NONE, Recompute.FULL}),
        leading_recompute=False,
        gradient_bytes=2,
        overlap_with_pipeline=False,
        overlap_zero=frozenset({1, 2, 3}),
        overlap_param_gather=False,
        scatters_gradients=False,
        reduces_accumulated=False,
    ),
    # The full space of the paper, a strategy for each layer.
    Target.ANY: Capabilities(
        target=Target.ANY,
        uniform=False,
        zero=frozenset({0, 1, 2, 3}),
        zero_with_pipeline=frozenset({0, 1, 2, 3}),
        tensor_with_pipeline=True,
        sequence_parallel=True,
        context_parallel=True,
        recompute=frozenset(Recompute),
        leading_recompute=False,
        gradient_bytes=4,
        expert_parallel=True,
    ),
}
