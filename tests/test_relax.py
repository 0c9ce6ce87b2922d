"""Relaxations are true: with the one change a sentence names, a plan fits; and with a smaller one it does not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.registry import read_model
from uniap_tune.errors import InfeasibleError
from uniap_tune.planner import Request, build, run
from uniap_tune.relax import memory_needed
from uniap_tune.space import Knobs, parse_knobs
from uniap_tune.spec import Job, Recompute
from uniap_tune.strategy import Target
from uniap_tune.units import GIB


def request(
    model: str,
    cluster: str,
    batch: int = 64,
    target: Target = Target.MEGATRON,
    seq_length: int = 4096,
    knobs: Knobs | None = None,
    recompute: frozenset[Recompute] = frozenset(Recompute),
) -> Request:
    job = Job(global_batch=batch, seq_length=seq_length, allowed_recompute=recompute)
    return Request(
        model=read_model(model), cluster=read_cluster(cluster), job=job, target=target, knobs=knobs or Knobs()
    )


REQUESTS = {
    "too large": request("llama-2-13b", "1x2:a100-80gb", 8),
    "deepspeed": request("llama-2-13b", "1x2:a100-80gb", 8, Target.DEEPSPEED),
    "any": request("llama-2-7b", "1x1:a100-80gb", 4, Target.ANY),
    "one device": request("llama-2-7b", "1x1:a100-40gb", 8),
    "fixed": request("llama-2-7b", "1x8:a100-40gb", knobs=parse_knobs(["dp=8", "zero=0"], [], [])),
    "capped": request("llama-2-13b", "1x8:a100-40gb", knobs=parse_knobs([], ["zero=1", "tp=1", "pp=1"], ["dp=2"])),
    "forbidden": request(
        "llama-3.2-1b", "1x1:a100-80gb", 8, seq_length=32768, knobs=parse_knobs([], [], ["recompute=full"])
    ),
    "no recompute": request(
        "llama-3.2-1b", "1x1:a100-80gb", 8, seq_length=32768, recompute=frozenset({Recompute.NONE})
    ),
    "fixed micro-batches": request("llama-2-7b", "1x8:a100-80gb", 512, knobs=parse_knobs(["microbatches=1"], [], [])),
    "long": request("llama-3-8b", "1x2:h100", 2, seq_length=1 << 20),
}


def fits(changed: Request) -> bool:
    try:
        found = run(changed).plan
    except InfeasibleError:
        return False
    return found.peak_memory_bytes <= changed.memory_limit_bytes * (1 + 1e-12)


def without(knobs: Knobs, option: str, knob: str, value: str) -> Knobs:
    if option == "fix":
        return replace(knobs, fix={k: v for k, v in knobs.fix.items() if k != knob})
    if option == "max":
        return replace(knobs, maximum={k: v for k, v in knobs.maximum.items() if k != knob})
    return replace(knobs, forbid=knobs.forbid - {(knob, value)})


def apply(asked: Request, sentence: str) -> Request:
    """The request with the change that a sentence describes."""
    job, cluster = asked.job, asked.cluster
    if found := re.fullmatch(r"without --(fix|max|forbid) (\w+)=(\w+)", sentence):
        return replace(asked, knobs=without(asked.knobs, *found.groups()))
    if sentence == "without any --fix, --max or --forbid":
        return replace(asked, knobs=Knobs())
    if sentence == "with full recompute allowed":
        return replace(asked, job=replace(job, allowed_recompute=job.allowed_recompute | {Recompute.FULL}))
    if found := re.match(r"a global batch of (\d+) instead of", sentence):
        return replace(asked, job=replace(job, global_batch=int(found[1])))
    if found := re.match(r"a sequence length of (\d+) instead of", sentence):
        return replace(asked, job=replace(job, seq_length=int(found[1])))
    if found := re.match(r"(\d+) devices \((\d+) nodes\) instead of", sentence):
        assert int(found[1]) == int(found[2]) * cluster.devices_per_node
        return replace(asked, cluster=replace(cluster, num_nodes=int(found[2])))
    found = re.match(r"devices with ([\d.]+) GiB usable memory \(([\d.]+) times what there is\)", sentence)
    assert found, sentence
    share = float(found[1]) * GIB / asked.memory_limit_bytes
    assert share == pytest.approx(float(found[2]), abs=0.006)
    return with_memory(asked, share)


def with_memory(asked: Request, share: float) -> Request:
    device = asked.cluster.device
    larger = replace(device, memory_bytes=share * device.memory_bytes)
    return replace(asked, cluster=replace(asked.cluster, device=larger))


@pytest.mark.parametrize("case", REQUESTS)
def test_every_relaxation_makes_a_plan_fit(case: str) -> None:
    asked = REQUESTS[case]
    with pytest.raises(InfeasibleError) as caught:
        run(asked)
    relaxations = caught.value.relaxations
    assert relaxations
    assert len(set(relaxations)) == len(relaxations)
    for sentence in relaxations:
        assert fits(apply(asked, sentence)), sentence


@pytest.mark.parametrize("case", ["too large", "one device", "fixed", "long"])
def test_a_smaller_device_than_said_does_not_do(case: str) -> None:
    asked = REQUESTS[case]
    with pytest.raises(InfeasibleError) as caught:
        run(asked)
    said = next(s for s in caught.value.relaxations if "usable memory" in s)
    size = float(said.split()[2])
    share = (size - 0.3) * GIB / asked.memory_limit_bytes
    assert not fits(with_memory(asked, share))


def test_fewer_nodes_than_said_do_not_do() -> None:
    asked = REQUESTS["too large"]
    with pytest.raises(InfeasibleError) as caught:
        run(asked)
    nodes = next(int(m[1]) for s in caught.value.relaxations if (m := re.search(r"\((\d+) nodes\)", s)))
    assert nodes > 1
    assert not fits(replace(asked, cluster=replace(asked.cluster, num_nodes=nodes - 1)))


def test_a_power_of_two_may_do_where_larger_numbers_do_not() -> None:
    knobs = parse_knobs([], [], ["recompute=full"])
    with pytest.raises(InfeasibleError) as caught:
        run(request("llama-2-7b", "7x4:rtx-4090", seq_length=65536, knobs=knobs))
    assert "32 devices (8 nodes) instead of 28" in caught.value.relaxations


def test_what_they_are_for_each_obstacle() -> None:
    def said(case: str) -> str:
        with pytest.raises(InfeasibleError) as caught:
            run(REQUESTS[case])
        return "\n".join(caught.value.relaxations)

    assert "without --fix dp=8" in said("fixed")
    assert "without --fix zero=0" in said("fixed")
    assert "without --max" in said("capped")
    assert "without --forbid recompute=full" in said("forbidden")
    assert "with full recompute allowed" in said("no recompute")
    assert "a global batch of" in said("fixed micro-batches")
    assert "this changes the training" in said("long")
    assert "devices (" in said("too large")


@pytest.mark.parametrize("model", ["llama-2-7b", "gpt2-xl"])
@pytest.mark.parametrize("target", [Target.MEGATRON, Target.DEEPSPEED])
def test_memory_needed_is_where_plans_begin_to_fit(model: str, target: Target) -> None:
    asked = request(model, "1x4:a100-80gb", 8, target, seq_length=1024)
    space, pricer = build(asked)
    needed = memory_needed(space, pricer)
    reserved = pricer.costs.reserved_bytes()
    memory = asked.cluster.device.memory_bytes
    assert fits(replace(asked, memory_fraction=(needed * 1.0001 + reserved) / memory))
    assert not fits(replace(asked, memory_fraction=(needed * 0.9999 + reserved) / memory))
    assert memory_needed(space, pricer, enough=10 * needed) >= needed


def test_chunks_of_unequal_length_are_the_reason_not_memory() -> None:
    """96 blocks cannot be cut into 88 chunks of nearly one length."""
    knobs = parse_knobs(["pp=8", "vpp=11"], [], [])
    with pytest.raises(InfeasibleError, match="cannot be interleaved with 11 chunks") as caught:
        run(request("gpt-3-175b", "8x8:a100-80gb", knobs=knobs, seq_length=2048))
    assert caught.value.relaxations == ("without --fix vpp=11",)
