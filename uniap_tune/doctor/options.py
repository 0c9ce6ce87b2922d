"""Every single change of a setup that is worth pricing; the engine may refuse some of them."""

from __future__ import annotations

from collections.abc import Iterator

from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.megatron import MegatronSetup
from uniap_tune.doctor.moves_deepspeed import deepspeed_moves
from uniap_tune.doctor.moves_megatron import megatron_moves
from uniap_tune.doctor.setup import Option, Setup


def options_of(setup: Setup, *settings: str) -> list[Option]:
    """The changes of a setup; those of some settings only, if these are given."""
    found: Iterator[Option] = iter(())
    if isinstance(setup, MegatronSetup):
        found = megatron_moves(setup)
    elif isinstance(setup, DeepSpeedSetup):
        found = deepspeed_moves(setup)
    return [option for option in found if not settings or option.setting in settings]
