"""Every single change of a setup that is worth pricing; the engine may refuse some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.megatron import MegatronSetup
from uniap_tune.doctor.moves import moves
from uniap_tune.doctor.setup import Option, Setup
from uniap_tune.space import divisors


def options_of(setup: Setup, *settings: str) -> list[Option]:
    """The changes of a setup; those of some settings only, if these are given."""
    found: Iterator[Option] = iter(())
    if isinstance(setup, MegatronSetup):
        found = moves(setup)
    elif isinstance(setup, DeepSpeedSetup):
        found = deepspeed_moves(setup)
    return [option for option in found if not settings or option.setting in settings]


def deepspeed_moves(setup: DeepSpeedSetup) -> Iterator[Option]:
    """Other ZeRO stages, micro-batches, degrees the script can run, checkpointing, overlap."""
    for stage in range(2 if setup.pp > 1 else 4):
        if stage != setup.zero and setup.dp > 1:
            yield setup.with_stage(stage)
    for size in divisors(max(1, setup.job.global_batch // setup.dp)):
        if size != setup.micro_batch:
            yield setup.with_micro_batch(size)
    yield setup.with_recompute(not setup.recompute)
    if setup.pp == 1 and setup.values.get("tensor_parallel") is not None:  # else the script feeds every rank its own
        for tp in divisors(min(setup.cluster.fast_domain, setup.cluster.num_devices)):
            if tp != setup.tp and _splits(setup, tp):
                yield setup.with_tensor(tp)
    if setup.pp > 1:
        for pp in divisors(setup.cluster.num_devices):
            if pp not in (1, setup.pp) and pp <= setup.model.num_layers:
                edits = (f"PipelineModule(num_stages={pp})",)
                yield Option(setting="pp/dp", edits=edits, setup=replace(setup, pp=pp, parts=()))
    if setup.zero in (1, 2) and not setup.overlaps and setup.dp > 1:
        yield setup.with_overlap()


def _splits(setup: DeepSpeedSetup, tp: int) -> bool:
    model = setup.model
    return model.num_heads % tp == 0 and model.num_kv_heads % tp == 0 and model.ffn_size % tp == 0
