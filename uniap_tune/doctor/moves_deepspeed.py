"""Single changes of a DeepSpeed configuration: what the JSON says, and degrees that the script can run."""

from __future__ import annotations

from collections.abc import Iterator

from uniap_tune.accumulation import shards_alone
from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.setup import Option
from uniap_tune.space import divisors
from uniap_tune.strategy import CAPABILITIES, Target


def deepspeed_moves(setup: DeepSpeedSetup) -> Iterator[Option]:
    """Every single change worth pricing."""
    engine = CAPABILITIES[Target.DEEPSPEED]
    for stage in range(2 if setup.pp > 1 else 4):
        differs = setup.dp > 1 or shards_alone(setup.job, engine, zero=stage or setup.zero, pp=setup.pp)
        if stage != setup.zero and differs:
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
                yield setup.with_stages(pp)
    if setup.zero in (1, 2) and not setup.overlaps and setup.dp > 1:
        yield setup.with_overlap()


def _splits(setup: DeepSpeedSetup, tp: int) -> bool:
    model = setup.model
    return model.num_heads % tp == 0 and model.num_kv_heads % tp == 0 and model.ffn_size % tp == 0
