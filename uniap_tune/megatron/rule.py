"""What a rule about Megatron's arguments is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from uniap_tune.megatron.facts import MegatronFacts

Check = Callable[[MegatronFacts], str]


@dataclass(frozen=True, slots=True)
class Rule:
    """A check that returns what is wrong, or nothing. ``accepted``: Megatron's own validation lets it pass."""

    name: str
    source: str
    accepted: bool
    check: Check


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule."""

    rule: Rule
    message: str

    def __str__(self) -> str:
        verdict = "Megatron accepts it and fails later" if self.rule.accepted else "Megatron refuses it"
        return f"{self.message} ({verdict}; {self.rule.source})"


RULES: list[Rule] = []


def rule(source: str, *, accepted: bool = False) -> Callable[[Check], Check]:
    """Registers a check under its own name; ``source`` is where Megatron says it."""

    def register(check: Check) -> Check:
        RULES.append(Rule(check.__name__, source, accepted, check))
        return check

    return register
