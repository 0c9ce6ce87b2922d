"""Which restrictions leave nothing, and the rule that is named."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.test_whatif import REQUESTS, VALUES
from tests.tiny import tiny_model
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.errors import InputError
from uniap_tune.legality import conflict, has_strategies, restrictions, without_each
from uniap_tune.planner import Request, build
from uniap_tune.space import Knobs, Space, parse_knobs
from uniap_tune.spec import Job
from uniap_tune.strategy import Target

TINY = Request(model=tiny_model(4), cluster=read_cluster("2x4:a100-80gb"), job=Job(global_batch=16, seq_length=1024))


def space(knobs: Knobs, request: Request = TINY) -> Space:
    return build(replace(request, knobs=knobs))[0]


@pytest.mark.parametrize(
    ("fix", "target", "reason"),
    [
        ("tp=3", Target.MEGATRON, "tp(3) does not divide the 8 devices"),
        ("tp=8", Target.MEGATRON, "tp 8 does not divide the 4 attention heads of tiny"),
        ("tp=4 pp=4", Target.MEGATRON, "tp(4) x pp(4) = 16 does not divide the 8 devices"),
        (
            "tp=2 dp=1 pp=2",
            Target.MEGATRON,
            "tp(2) x dp(1) x pp(2) = 4 of the 8 devices leaves cp 2, which is tried",
        ),
        ("tp=1 cp=2 dp=1 pp=2", Target.MEGATRON, "tp(1) x cp(2) x dp(1) x pp(2) = 4 is not the 8 devices"),
        ("pp=8", Target.MEGATRON, "pp 8 is more than the 6 layers (embedding and head counted)"),
        ("pp=2 vpp=4", Target.MEGATRON, "pp 2 with 4 model chunks a stage needs 8 chunks of at least one of 6 layers"),
        ("pp=1 vpp=2", Target.MEGATRON, "vpp 2 needs a pipeline, and pp is 1"),
        ("pp=2 vpp=2 microbatches=1", Target.MEGATRON, "its 1 micro-batches in multiples of its stages"),
        ("vpp=2", Target.DEEPSPEED, "deepspeed does not interleave its pipeline"),
        ("tp=2 pp=2", Target.DEEPSPEED, "deepspeed does not run tensor parallelism and a pipeline together"),
        ("cp=2", Target.DEEPSPEED, "deepspeed has no context parallelism"),
        ("zero=2 pp=2", Target.MEGATRON, "megatron shards no more than ZeRO 1 with a pipeline: ZeRO 2 needs pp 1"),
        ("zero=1 tp=4 pp=2", Target.MEGATRON, "ZeRO 1 shards over replicas, and tp x pp = 8 leaves one"),
        ("ep=2", Target.MEGATRON, "tiny has no experts to spread"),
        ("recompute=selective", Target.MEGATRON, "FlashAttention already recomputes the attention core"),
        ("recompute=selective", Target.DEEPSPEED, "deepspeed has no selective recomputation"),
        ("mbs=3", Target.MEGATRON, "micro-batch(3) does not divide the global batch of 16"),
        ("dp=8 mbs=4", Target.MEGATRON, "dp(8) x micro-batch(4) = 32 does not divide the global batch of 16"),
        ("dp=2 mbs=2 microbatches=2", Target.MEGATRON, "= 8 is not the global batch of 16"),
    ],
)
def test_the_rule_is_named(fix: str, target: Target, reason: str) -> None:
    found = conflict(space(Knobs(fix=dict(item.split("=") for item in fix.split())), replace(TINY, target=target)))
    assert found is not None
    assert any(reason in text for text in found.reasons), found.reasons


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"family": "phi3"}, "DeepSpeed's AutoTP does not cut models of the family phi3"),
        ({"num_kv_heads": 1}, "AutoTP cuts attention by the 1 key-value heads, which tp 2 does not divide"),
    ],
)
def test_what_deepspeed_cannot_cut_is_named(changes: dict[str, Any], reason: str) -> None:
    request = replace(TINY, target=Target.DEEPSPEED, model=replace(TINY.model, **changes))
    found = conflict(space(Knobs(fix={"tp": "2"}), request))
    assert found is not None
    assert reason in found.reasons


def test_every_recompute_mode_forbidden() -> None:
    found = conflict(space(parse_knobs([], [], ["recompute=full", "recompute=none"])))
    assert found is not None
    assert found.reasons == ("recompute can only be full or none here, and each is forbidden",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=9", "--fix speed=9: there is no knob 'speed'; fix: one of pp, vpp,"),
        ("vpp=0", "'0' is no possible value of vpp; fix: give a whole number above zero"),
        ("zero=4", "'4' is no possible value of zero; fix: one of 0, 1, 2, 3"),
    ],
)
def test_what_a_knob_may_be(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_knobs([text], [], [])
    assert message in str(caught.value)


def test_a_long_sequence_is_cut_into_equal_pieces() -> None:
    request = replace(TINY, job=Job(global_batch=16, seq_length=1022))
    found = conflict(space(Knobs(fix={"cp": "2"}), request))
    assert found is not None
    assert found.reasons == ("cp 2 cuts a sequence into 4 equal pieces, which 1022 tokens do not allow",)


def test_rules_of_experts() -> None:
    request = REQUESTS["experts"]
    cases: Mapping[str, str] = {
        "ep=3": "ep 3 does not divide the 4 experts of tiny",
        "etp=3": "etp 3 does not divide the experts' width 512",
        "ep=4 pp=4": "ep(4) x etp(1) = 4 does not divide the 1 devices of a stage",
        "tp=4 etp=2": "experts are whole (etp 1) or split as the rest is (etp 4), not by 2",
    }
    for fix, reason in cases.items():
        found = conflict(space(Knobs(fix=dict(item.split("=") for item in fix.split())), request))
        assert found is not None
        assert reason in found.reasons
    found = conflict(space(Knobs(fix={"ep": "2"}), replace(request, target=Target.DEEPSPEED)))
    assert found is not None
    assert found.reasons == ("deepspeed has no expert parallelism",)


def test_only_what_clashes_is_blamed() -> None:
    found = conflict(space(parse_knobs(["pp=2", "tp=3", "zero=1"], ["dp=8"], ["recompute=full"])))
    assert found is not None
    assert restrictions(found.knobs) == ("--fix tp=3",)
    found = conflict(space(parse_knobs(["tp=4"], ["tp=2"], ["zero=2"])))
    assert found is not None
    assert set(restrictions(found.knobs)) == {"--fix tp=4", "--max tp=2"}
    assert found.reasons == ("--max tp=2 excludes tp 4",)
    found = conflict(space(parse_knobs(["tp=4"], [], ["tp=4", "pp=1"])))
    assert found is not None
    assert found.reasons == ("--forbid tp=4 excludes it",)


def test_blame_is_minimal_and_enough() -> None:
    """Over random restrictions: what is blamed leaves nothing, and without any one of it something is left."""
    draw = random.Random(3)
    clashes = 0
    for _ in range(150):
        name = draw.choice(sorted(REQUESTS))
        names = draw.sample(sorted(VALUES), draw.choice((1, 2, 3, 4)))
        knobs = Knobs(
            fix={knob: draw.choice(VALUES[knob]) for knob in names[:3]},
            maximum={"tp": draw.choice((1, 2))} if draw.random() < 0.3 else {},
            forbid=frozenset({("pp", "1")}) if draw.random() < 0.3 else frozenset(),
        )
        whole = space(knobs, REQUESTS[name])
        found = conflict(whole)
        assert (found is None) == has_strategies(whole)
        if found is None:
            continue
        clashes += 1
        assert found.reasons
        assert not has_strategies(replace(whole, knobs=found.knobs))
        assert all(has_strategies(replace(whole, knobs=fewer)) for _, fewer in without_each(found.knobs))
        assert set(restrictions(found.knobs)) <= set(restrictions(knobs))
    assert clashes >= 40


def test_four_degrees_that_are_not_the_devices() -> None:
    found = conflict(space(parse_knobs(["tp=2", "cp=1", "dp=1", "pp=2", "zero=0"], [], [])))
    assert found is not None
    assert found.reasons == ("tp(2) x cp(1) x dp(1) x pp(2) = 4 is not the 8 devices",)
    assert restrictions(found.knobs) == ("--fix tp=2", "--fix cp=1", "--fix dp=1", "--fix pp=2")


def test_a_job_that_is_illegal_by_itself() -> None:
    request = replace(TINY, cluster=read_cluster("1x37:h100"))
    found = conflict(space(Knobs(), request))
    assert found is not None
    assert restrictions(found.knobs) == ()
    assert "the 37 devices" in found.reasons[0]
