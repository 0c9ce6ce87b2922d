"""plan.json: written, read back, and refused when it is something else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launches import deepspeed_launches, megatron_launches
from tests.plans import make_plan
from uniap_tune.errors import InputError
from uniap_tune.plan import Plan, plan_from_dict
from uniap_tune.spec import Job
from uniap_tune.strategy import Strategy, Target


def plan(**strategy: Any) -> Plan:
    return make_plan(
        Target.MEGATRON, [2, 3], Strategy(tp=2, dp=2, **strategy), Job(global_batch=16, seq_length=512),
        microbatches=4, full=[1, 2],
    )  # fmt: skip


def test_round_trip_of_every_kind_of_plan() -> None:
    for launch in [*megatron_launches(), *deepspeed_launches()]:
        again = plan_from_dict(json.loads(launch.plan.to_json()), "plan.json")
        assert again == launch.plan
        assert again.to_json() == launch.plan.to_json()


def test_text_is_strict_json_in_a_fixed_order() -> None:
    text = plan().to_json()
    assert text.endswith("}\n")
    data = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert next(iter(data)) == "schema_version"
    assert data["schema_version"] == 1
    keys = {"status", "target", "objective_s", "bound_s", "gap", "step_time_s", "tokens_per_s", "mfu", "pp"}
    keys |= {"peak_memory_bytes", "memory_limit_bytes", "num_microbatches", "micro_batch_size", "stages"}
    keys |= {"inputs", "assumptions"}
    assert keys <= set(data)
    assert data["stages"][0]["layers"] == ["embedding", "layers.0", "layers.1"]
    assert data["stages"][0]["strategies"][1]["recompute"] == "full"
    assert not {"cpu_s", "wall_s", "solver"} & set(data)


def test_properties() -> None:
    made = plan()
    assert made.uniform() is not None
    assert [stage.num_blocks for stage in made.stages] == [2, 3]
    assert len(made.strategies) == 7
    assert made.peak_memory_bytes == 1e9


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions_are_refused(version: object) -> None:
    data = plan().to_dict() | {"schema_version": version}
    with pytest.raises(InputError, match=r"a\.json: schema_version"):
        plan_from_dict(data, "a.json")


@pytest.mark.parametrize(
    "change",
    [
        {"target": "jax"},
        {"stages": None},
        {"stages": 3},
        {"stages": [{}]},
        {"stages": ["x"]},
    ],
)
def test_what_is_no_plan_is_refused(change: dict[str, Any]) -> None:
    data = json.loads(plan().to_json()) | change
    with pytest.raises(InputError, match=r"a\.json: not a plan"):
        plan_from_dict(data, "a.json")


def test_a_missing_field_or_a_wrong_strategy_is_refused() -> None:
    for key in ("status", "stages", "pp", "objective_s", "target"):
        data = json.loads(plan().to_json())
        del data[key]
        with pytest.raises(InputError, match="not a plan"):
            plan_from_dict(data, "a.json")
    data = json.loads(plan().to_json())
    data["stages"][0]["strategies"][0]["recompute"] = "sometimes"
    with pytest.raises(InputError, match="not a plan"):
        plan_from_dict(data, "a.json")
