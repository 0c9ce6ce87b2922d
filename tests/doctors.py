"""Setups for tests of the doctor."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.recipes import read_recipe
from uniap_tune.adapters.registry import read_model
from uniap_tune.breakdown import break_down
from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.diagnosis import limit_for
from uniap_tune.doctor.finding import FINDINGS, Advice, Case
from uniap_tune.doctor.findings import examine  # noqa: F401 - registers the checks
from uniap_tune.doctor.megatron import MegatronSetup, Values
from uniap_tune.doctor.reading import Given, read_setup
from uniap_tune.doctor.setup import Setup
from uniap_tune.spec import Cluster, Model, Precision
from uniap_tune.strategy import Target

RECIPES = Path(__file__).parent / "recipes"


@cache
def cluster(name: str) -> Cluster:
    """A cluster by its short form."""
    return read_cluster(name)


@cache
def model(name: str) -> Model:
    """A shipped model."""
    return read_model(name)


def megatron(
    name: str = "llama-2-7b",
    on: str = "1x8:a100-80gb",
    batch: int = 128,
    seq: int = 4096,
    arguments: Values | None = None,
    precision: Precision | None = None,
    **pairs: str,
) -> MegatronSetup:
    """Plain settings for Megatron, with other arguments on top."""
    given = Given(
        cluster=cluster(on), model=model(name), global_batch=batch, seq_length=seq, pairs=pairs,
        precision=precision or Precision(),
    )  # fmt: skip
    setup = read_setup(None, given)
    assert isinstance(setup, MegatronSetup)
    changed = setup.changed("test", arguments or {}).setup
    assert isinstance(changed, MegatronSetup)
    return changed


def deepspeed(
    name: str = "llama-2-7b", on: str = "1x8:a100-80gb", batch: int = 128, seq: int = 2048, **pairs: str
) -> DeepSpeedSetup:
    """Plain settings for DeepSpeed."""
    given = Given(
        cluster=cluster(on), model=model(name), global_batch=batch, seq_length=seq, pairs=pairs, target=Target.DEEPSPEED
    )
    setup = read_setup(None, given)
    assert isinstance(setup, DeepSpeedSetup)
    return setup


def recipe(name: str, on: str) -> MegatronSetup:
    """A recipe of the tests."""
    return MegatronSetup(recipe=read_recipe(str(RECIPES / name)), cluster=cluster(on))


def case(setup: Setup) -> Case:
    """What findings look at."""
    run = setup.run()
    return Case(setup=setup, run=run, breakdown=break_down(run), limit=limit_for(run))


def advice(name: str, setup: Setup) -> Advice | None:
    """What one check says."""
    (known,) = [known for known in FINDINGS if known.name == name]
    return known.check(case(setup))


def json_setup(values: dict[str, Any], path: Path, **given: Any) -> Setup:
    """A DeepSpeed JSON of these values."""
    import json

    path.write_text(json.dumps(values), encoding="utf-8")
    return read_setup(str(path), Given(**given))
