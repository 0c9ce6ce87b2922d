"""What the doctor looks at: a configuration as somebody runs it, and the single changes one could make to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from uniap_tune.predict import Run
from uniap_tune.spec import Cluster, Job, Model

SETTINGS = "parallel settings"  # the format of a setup that is in no file


class Setup(Protocol):
    """A configuration of one engine on one cluster. Immutable: a change is another setup."""

    @property
    def name(self) -> str:
        """What it was read from, as messages show it."""

    @property
    def format(self) -> str:
        """What kind of file that is."""

    @property
    def engine(self) -> str:
        """Who runs it: ``Megatron`` or ``DeepSpeed``."""

    @property
    def model(self) -> Model:
        """What is trained."""

    @property
    def cluster(self) -> Cluster:
        """Where it is trained."""

    @property
    def job(self) -> Job:
        """How it is trained."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed or left open, one sentence each."""

    @property
    def broken(self) -> tuple[tuple[str, str], ...]:
        """What the engine refuses or fails with: names of rules and sentences."""

    @property
    def runs(self) -> bool:
        """Whether it can be priced all the same: what is broken does not decide what is run."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Its parallel settings by name, for people: ``{"pp": "2", "tp": "4", …}``."""

    def run(self) -> Run:
        """What the engine would run. Only for setups of which :attr:`runs` is true."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One change of a setup.

    Attributes:
        setting: what is changed; of several options for one setting only the best is shown.
        edits: what to write: an argument, ``without --name``, ``NAME=value``, ``key = value`` of a JSON.
        setup: the configuration afterwards.
    """

    setting: str
    edits: tuple[str, ...]
    setup: Setup


def together(first: Option, second: Option) -> Option:
    """Two options, the second made of the first one's setup, as one."""
    again = {_subject(edit) for edit in second.edits}
    kept = tuple(edit for edit in first.edits if _subject(edit) not in again)
    return Option(
        setting=" and ".join(sorted((first.setting, second.setting))), edits=kept + second.edits, setup=second.setup
    )


def _subject(edit: str) -> str:
    """What an edit is about: ``--name``, the variable or the key."""
    words = edit.split()
    word = words[1] if words[0] in ("without", "unset") else words[0]
    return word.removeprefix("--").partition("=")[0]


# Settings that follow from others, and from which.
_FOLLOWS = {"micro-batches": ("dp", "micro-batch"), "layers": ("pp", "vpp"), "sequence parallel": ("tp",)}
# What people take for granted: shown only where it is otherwise.
_USUAL = {"cp": "1", "ep": "1", "etp": "1", "vpp": "1", "offload": "none"}


def difference(before: Setup, after: Setup) -> str:
    """What changes between two setups of one kind, for people: ``"tp 4 -> 8, dp 2 -> 1"``."""
    old, new = before.settings, after.settings
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    told = [key for key in changed if not any(cause in changed for cause in _FOLLOWS.get(key, ()))]
    return ", ".join(f"{key} {old.get(key, 'none')} -> {new.get(key, 'none')}" for key in told)


def shown_settings(setup: Setup) -> dict[str, str]:
    """The settings, without those that are as usual."""
    return {name: value for name, value in setup.settings.items() if _USUAL.get(name) != value}
