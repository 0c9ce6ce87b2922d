"""Why a space is empty: which of the restrictions clash, and the rule of the engine or of arithmetic behind it.

The verdict comes from :class:`~uniap_tune.space.Space` itself; the rules here only put it into words. They are asked
about the fewest restrictions that still leave nothing, so that a rule that speaks is a rule that forbids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod

from uniap_tune.accumulation import shards_alone
from uniap_tune.autotp import tensor_refusal
from uniap_tune.space import Knobs, Space
from uniap_tune.spec import Recompute
from uniap_tune.strategy import Target

_GRID = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True, slots=True)
class Conflict:
    """Restrictions that together leave no strategy, none of them too many.

    Attributes:
        knobs: the restrictions; none where the job itself leaves nothing.
        reasons: the rules that forbid them, one sentence each.
    """

    knobs: Knobs
    reasons: tuple[str, ...]


def has_strategies(space: Space) -> bool:
    """Whether any strategy is legal."""
    counts = space.microbatch_counts()
    return any(space.families(pp, c) for pp in space.pipeline_sizes() for c in counts)


def conflict(space: Space) -> Conflict | None:
    """Why a space is empty; ``None`` if it is not."""
    if has_strategies(space):
        return None
    knobs = space.knobs
    grid = {knob: value for knob, value in knobs.fix.items() if knob in _GRID}
    if len(grid) == len(_GRID) and prod(map(int, grid.values())) != space.cluster.num_devices:
        knobs = Knobs(fix=grid)  # without its cp it would clash for another reason
    for fewer in _without_each(knobs) if knobs is space.knobs else ():
        smaller = _common(knobs, fewer)
        if not has_strategies(replace(space, knobs=smaller)):
            knobs = smaller
    reasons = tuple(text for rule in _RULES for text in rule(replace(space, knobs=knobs), _numbers(knobs)))
    return Conflict(knobs, reasons or (_in_general(space, knobs),))


def restrictions(knobs: Knobs) -> tuple[str, ...]:
    """The restrictions as the command line has them: ``("--fix tp=8", "--forbid zero=3")``."""
    return tuple(option for option, _ in without_each(knobs))


def without_each(knobs: Knobs) -> Iterator[tuple[str, Knobs]]:
    """Each restriction, as the command line has it, and the knobs without it."""
    for knob, value in knobs.fix.items():
        yield f"--fix {knob}={value}", replace(knobs, fix={k: v for k, v in knobs.fix.items() if k != knob})
    for knob, cap in knobs.maximum.items():
        looser = {k: v for k, v in knobs.maximum.items() if k != knob}
        yield f"--max {knob}={cap}", replace(knobs, maximum=looser)
    for knob, value in sorted(knobs.forbid):
        yield f"--forbid {knob}={value}", replace(knobs, forbid=knobs.forbid - {(knob, value)})


def _without_each(knobs: Knobs) -> list[Knobs]:
    """Bans and caps are dropped first: what is fixed is blamed for what it alone forbids."""
    return [fewer for _, fewer in reversed(list(without_each(knobs)))]


def _common(a: Knobs, b: Knobs) -> Knobs:
    return Knobs(
        fix={k: v for k, v in a.fix.items() if k in b.fix},
        maximum={k: v for k, v in a.maximum.items() if k in b.maximum},
        forbid=a.forbid & b.forbid,
    )


def _numbers(knobs: Knobs) -> Mapping[str, int]:
    return {knob: int(value) for knob, value in knobs.fix.items() if knob != "recompute"}


def _in_general(space: Space, knobs: Knobs) -> str:
    asked = ", ".join(restrictions(knobs)) or "this job"
    devices, batch = space.cluster.num_devices, space.job.global_batch
    return (
        f"{asked}: no choice of the other degrees makes tp x cp x dp x pp the {devices} devices "
        f"while dp x micro-batch divides the global batch of {batch}"
    )


# -- the rules, each of which speaks only where it forbids -------------------------------------------------------------


def _bans(space: Space, _: Mapping[str, int]) -> Iterator[str]:
    knobs = space.knobs
    for knob, value in knobs.fix.items():
        if (knob, value) in knobs.forbid:
            yield f"--forbid {knob}={value} excludes it"
        if knob in knobs.maximum and int(value) > knobs.maximum[knob]:
            yield f"--max {knob}={knobs.maximum[knob]} excludes {knob} {value}"


def _devices(space: Space, fixed: Mapping[str, int]) -> Iterator[str]:
    grid = {knob: fixed[knob] for knob in _GRID if knob in fixed}
    total, devices = prod(grid.values()), space.cluster.num_devices
    text = " x ".join(f"{knob}({value})" for knob, value in grid.items())
    made = text if len(grid) == 1 else f"{text} = {total}"
    if devices % total:
        yield f"{made} does not divide the {devices} devices"
    elif total != devices and grid.keys() >= {"tp", "dp", "pp"}:
        left = f"leaves cp {devices // total}, which is tried only when asked for"
        yield f"{made} is not the {devices} devices" if "cp" in grid else f"{made} of the {devices} devices {left}"


def _stages(space: Space, fixed: Mapping[str, int]) -> Iterator[str]:
    layers = space.model.num_layers + 2
    v = fixed.get("vpp", 1)
    pp = fixed.get("pp", 2 if v > 1 else 1)
    if pp > layers:
        yield f"pp {pp} is more than the {layers} layers (embedding and head counted), and no stage may be empty"
    elif pp * v > layers:
        yield f"pp {pp} with {v} model chunks a stage needs {pp * v} chunks of at least one of {layers} layers"


def _heads(space: Space, fixed: Mapping[str, int]) -> Iterator[str]:
    model, tp = space.model, fixed.get("tp", 1)
    if model.num_heads % tp:
        yield f"tp {tp} does not divide the {model.num_heads} attention heads of {model.name}"
    if model.ffn_size % tp:
        yield f"tp {tp} does not divide the feed-forward width {model.ffn_size} of {model.name}"
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        yield f"tp {tp} and the {model.num_kv_heads} key-value heads of {model.name}: neither divides the other"
    elif space.capabilities.target is Target.DEEPSPEED and (reason := tensor_refusal(model, tp)):
        yield reason


def _context(space: Space, fixed: Mapping[str, int]) -> Iterator[str]:
    cp, length = fixed.get("cp", 1), space.job.seq_length
    if cp == 1:
        return
    if not space.capabilities.context_parallel:
        yield f"{space.capabilities.target} has no context parallelism"
    elif length % (2 * cp):
        yield f"cp {cp} cuts a sequence into {2 * cp} equal pieces, which {length} tokens do not allow"


def _pipeline(space: Space, fixed: Mapping[str, int]) -> Iterator[str]:
    target, capabilities = space.capabilities.target, space.capabilities
    pp, v, c = fixed.get("pp", 0), fixed.get("vpp", 1), fixed.get("microbatches", 0)
    if fixed.get("tp", 1) > 1 and pp > 1 and not capabilities.tensor_with_pipeline:
        yield f"{target} does not run tensor parallelism and a pipeline together"
    if v > 1 and not capabilities.interleaving:
        yield f"{target} does not interleave its pipeline"
    elif v > 1 and pp == 1:
        yield f"vpp {v} needs a pipeline, and pp is 1"
    elif v > 1 and c and (c % pp if pp else gcd(c, space.cluster.num_devices) == 1):
        yield f"an interleaved pipeline needs its {c} micro-batches in multiples of its stages"


def _zero(space: Space, fixed: Mapping[str, int]) -> Iterator[str]:
    zero, pp, target = fixed.get("zero", 0), fixed.get("pp", 1), space.capabilities.target
    grid, devices = prod(fixed.get(knob, 1) for knob in ("tp", "pp")), space.cluster.num_devices
    if zero not in space.capabilities.zero:
        yield f"{target} has no ZeRO {zero}"
    elif zero not in space.zero_stages(pp):
        most = max(space.capabilities.zero_with_pipeline)
        yield f"{target} shards no more than ZeRO {most} with a pipeline: ZeRO {zero} needs pp 1"
    elif zero and grid == devices and not shards_alone(space.job, space.capabilities, zero=zero, pp=pp):
        yield f"ZeRO {zero} shards over replicas, and tp x pp = {grid} leaves one"
    else:
        allowed = [other for other in space.zero_stages(pp) if space.knobs.allows("zero", other)]
        reasons = {space.zero_refusal(other, pp) for other in allowed}
        if "" not in reasons:
            yield from sorted(reasons)


def _experts(space: Space, fixed: Mapping[str, int]) -> Iterator[str]:
    model, target, moe = space.model, space.capabilities.target, space.model.moe
    ep, etp, tp = fixed.get("ep", 1), fixed.get("etp", 1), fixed.get("tp")
    if ep == etp == 1:
        return
    if moe is None:
        yield f"{model.name} has no experts to spread"
        return
    if not space.capabilities.expert_parallel:
        yield f"{target} has no expert parallelism"
    if moe.num_experts % ep:
        yield f"ep {ep} does not divide the {moe.num_experts} experts of {model.name}"
    if moe.expert_ffn_size % etp:
        yield f"etp {etp} does not divide the experts' width {moe.expert_ffn_size}"
    if tp is not None and etp not in (1, tp):
        yield f"experts are whole (etp 1) or split as the rest is (etp {tp}), not by {etp}"
    stage = space.cluster.num_devices // fixed.get("pp", 1)
    if stage % (ep * etp):
        yield f"ep({ep}) x etp({etp}) = {ep * etp} does not divide the {stage} devices of a stage"


def _recompute(space: Space, _: Mapping[str, int]) -> Iterator[str]:
    asked = space.knobs.fix.get("recompute")
    if asked is None:
        modes = space.capabilities.recompute & space.job.allowed_recompute
        modes -= {Recompute.SELECTIVE} if space.job.flash_attention else set()
        if not any(space.knobs.allows("recompute", mode) for mode in modes):
            yield f"recompute can only be {' or '.join(sorted(modes))} here, and each is forbidden"
        return
    mode = Recompute(asked)
    if mode not in space.capabilities.recompute:
        yield f"{space.capabilities.target} has no {mode} recomputation"
    elif mode not in space.job.allowed_recompute:
        yield f"the job does not allow {mode} recomputation"
    elif mode is Recompute.SELECTIVE and space.job.flash_attention:
        yield "FlashAttention already recomputes the attention core, which is what selective recomputation does"


def _batch(space: Space, fixed: Mapping[str, int]) -> Iterator[str]:
    parts = {name: fixed[knob] for knob, name in _BATCH.items() if knob in fixed}
    total, batch = prod(parts.values()), space.job.global_batch
    if batch % total or (len(parts) == len(_BATCH) and total != batch):
        text = " x ".join(f"{name}({value})" for name, value in parts.items())
        made = text if len(parts) == 1 else f"{text} = {total}"
        yield (
            f"{made} does not divide the global batch of {batch}"
            if batch % total
            else (f"{made} is not the global batch of {batch}")
        )


_BATCH = {"dp": "dp", "mbs": "micro-batch", "microbatches": "micro-batches"}
_Rule = Callable[[Space, Mapping[str, int]], Iterator[str]]
_RULES: tuple[_Rule, ...] = (
    _bans, _devices, _stages, _heads, _context, _pipeline, _zero, _experts, _recompute, _batch,
)  # fmt: skip
