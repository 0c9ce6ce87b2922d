"""The rules against Megatron's own validation: what we say it refuses, it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.test_megatron_arguments import ask
from tests.conformance.test_megatron_arguments import megatron as megatron  # the fixture
from tests.test_megatron_rules import BREAKS, MORE, facts
from uniap_tune.megatron_rules import RULES

FURTHER = ["--max-position-embeddings", "8192", "--train-iters", "10", "--lr", "1e-4", "--bf16", "--mock-data"]
FURTHER += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]
REFUSED = {rule.name for rule in RULES if not rule.accepted}


def case(changes: dict[str, Any]) -> dict[str, Any]:
    found = facts(changes)
    argv = [word for name, value in found.arguments.items() for word in _words(name, value)]
    return {
        "argv": [*argv, *FURTHER],
        "environment": dict(found.environment),
        "world_size": found.world,
        "generation": 9,
        "build": [],
    }


def _words(name: str, value: str | bool) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", *_split(name, str(value))]


def _split(name: str, value: str) -> list[str]:
    return value.split() if name == "rampup-batch-size" else [value]


@pytest.mark.slow
def test_megatron_refuses_what_the_rules_say(megatron: Path) -> None:
    breaches = [(rule, changes) for rule, changes in [*BREAKS.items(), *MORE] if rule in REFUSED]
    answers = ask(megatron, [case({}), *(case(changes) for _, changes in breaches)])
    assert not answers[0].get("error"), answers[0]
    wrong = [rule for (rule, _), answer in zip(breaches, answers[1:], strict=True) if not answer.get("error")]
    assert not wrong
