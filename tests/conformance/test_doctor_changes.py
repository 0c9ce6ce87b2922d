"""What the doctor proposes, the engines accept: Megatron's own validation, and DeepSpeed's own engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.test_megatron_arguments import ask
from tests.conformance.test_megatron_arguments import megatron as megatron  # the fixture
from tests.conformance.test_megatron_rules import SET_ELSEWHERE, case
from tests.doctors import deepspeed
from tests.doctors import megatron as settings
from tests.test_tune import ALL, CLUSTER, read
from uniap_tune.adapters.megatron_flags import RELEVANT
from uniap_tune.deepspeed.check import Case, check_cases
from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.finding import is_legal
from uniap_tune.doctor.megatron import MegatronSetup
from uniap_tune.doctor.options import options_of
from uniap_tune.megatron.facts import CONNECTIONS, MegatronFacts

PLAIN = (
    settings(tp="2", pp="2", zero="1"),
    settings(pp="4", vpp="2", zero="1", recompute="full"),
    settings("mixtral-8x7b", "8x8:h100", tp="4", pp="4", ep="8", etp="1", zero="1"),
)
# Changes of a setup that are tried, spread over all of them: Megatron takes a tenth of a second for each.
MOST = 16


def cases_of(setup: MegatronSetup) -> list[dict[str, Any]]:
    """Its legal changes as Megatron's arguments, without what is about data."""
    legal = [option.setup for option in options_of(setup) if is_legal(setup, option)]
    found = []
    for changed in legal[:: max(1, len(legal) // MOST)]:
        assert isinstance(changed, MegatronSetup)
        facts = changed.facts
        kept = {key: value for key, value in facts.arguments.items() if key in RELEVANT - SET_ELSEWHERE}
        queues = {} if facts.zero > 1 else {CONNECTIONS: "1"}
        found.append(case(MegatronFacts(kept, world=facts.world, environment=queues)))
    return found


@pytest.mark.slow
def test_megatron_accepts_every_change(megatron: Path) -> None:
    setups = [*PLAIN, *(MegatronSetup(recipe=read(name), cluster=CLUSTER) for name in ALL)]
    named = [(setup.name, one) for setup in setups if not setup.broken for one in cases_of(setup)]
    answers = ask(megatron, [one for _, one in named])
    refused = [
        (name, answer["error"], one["argv"])
        for (name, one), answer in zip(named, answers, strict=True)
        if answer.get("error")
    ]
    assert len(named) >= 100
    assert not refused, {(name, error[:200]) for name, error, _ in refused}


@pytest.mark.slow
def test_deepspeed_accepts_every_change() -> None:
    pytest.importorskip("deepspeed")
    setups = [deepspeed(zero="2", mbs="2"), deepspeed(pp="2", mbs="2"), deepspeed(tp="2", zero="1", batch=64)]
    cases = []
    for setup in setups:
        for option in options_of(setup):
            if is_legal(setup, option):
                changed = option.setup
                assert isinstance(changed, DeepSpeedSetup)
                steps = {"gradient_accumulation_steps": changed.microbatches}
                parts = tuple(4 * stage for stage in range(changed.pp + 1)) if changed.pp > 1 else ()
                cases.append(Case(config={**changed.values, **steps}, world_size=8, layers=4 * changed.pp, parts=parts))
    verdicts = check_cases(cases)
    assert len(cases) >= 20
    assert not [verdict.reason for verdict in verdicts if verdict.refused]
    assert all(verdict.roles for verdict in verdicts)
