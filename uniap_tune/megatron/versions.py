"""Which arguments each version of Megatron-LM knows, by the tables in ``uniap_tune/data/megatron``.

A table is what the parser of that version says itself; ``tests/conformance/megatron_flags.py`` writes them.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

# Oldest first. Names are those of the tables; ``head`` is the development branch.
VERSIONS = ("0.16", "0.19", "head")
DEFAULT_VERSION = "0.19"


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronVersion:
    """A version of Megatron-LM.

    Attributes:
        name: as the user says it.
        release: the exact release the table is of.
        source: where it comes from.
        arguments: names of all it knows, without dashes.
        null_tokenizer_adds: tokens that its null tokenizer has beyond the vocabulary it is told.
    """

    name: str
    release: str
    source: str
    arguments: frozenset[str]
    null_tokenizer_adds: int


@cache
def megatron_version(name: str) -> MegatronVersion:
    """The version of this name, one of :data:`VERSIONS`."""
    text = (resources.files("uniap_tune.data") / "megatron" / f"{name}.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    words = " ".join(data[kind] for kind in ("switches", "values", "lists"))
    return MegatronVersion(
        name=name,
        release=data["version"],
        source=data["source"],
        arguments=frozenset(words.split()),
        null_tokenizer_adds=data["null_tokenizer_adds"],
    )


def versions_with(argument: str) -> tuple[str, ...]:
    """The versions that know an argument (without dashes), oldest first."""
    return tuple(name for name in VERSIONS if argument in megatron_version(name).arguments)
