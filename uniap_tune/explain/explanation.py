"""Everything ``explain`` has to say about the plan of a request, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniap_tune.deadline import Deadline
from uniap_tune.explain.memory_price import MemoryPrice, MemoryStep, memory_price
from uniap_tune.explain.sensitivity import Sensitivity, sensitivities
from uniap_tune.explain.summary import Alternative, compare, grid, time_shares
from uniap_tune.explain.whatif import Restriction, WhatIf, other_grid, restriction_costs, target_prices, whatif
from uniap_tune.plan import SCHEMA_VERSION, Plan
from uniap_tune.planner import Planning, Request, run
from uniap_tune.strategy import Target


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Explanation:
    """A plan and the reasons for it. What time ran out for is ``None`` or left out.

    Attributes:
        planning: the plan, and the next best as its second.
        memory: what more memory would buy.
        runner_up: the second best plan; ``None`` if no other fits.
        other_grid: the best plan with other parallel degrees; it may be the runner-up.
        why_not: the answers to what was asked.
        restrictions: what each --fix, --max and --forbid costs.
        targets: for ``any``, what the restriction to an engine costs, relative; ``None`` if it cannot.
        sensitivities: the plans where the network, the memory or the batch differ.
        is_complete: whether everything was solved in time.
    """

    planning: Planning
    memory: MemoryPrice | None
    runner_up: Alternative | None
    other_grid: Alternative | None
    why_not: tuple[WhatIf, ...]
    restrictions: tuple[Restriction, ...]
    targets: Mapping[str, float | None]
    sensitivities: tuple[Sensitivity, ...]
    is_complete: bool

    @property
    def plan(self) -> Plan:
        """The plan that is explained."""
        return self.planning.plan

    @property
    def ideal_s(self) -> float:
        """Seconds of a step if every device did nothing but the model's arithmetic, at its peak."""
        return self.plan.mfu * self.plan.step_time_s

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; see docs/reference/explain.md."""
        plan = self.plan
        return {
            "schema_version": SCHEMA_VERSION,
            "status": plan.status,
            "complete": self.is_complete,
            "plan": plan.to_dict(),
            "step": {"seconds": plan.step_time_s, "ideal_s": self.ideal_s, "parts_s": time_shares(plan)},
            "memory": _memory_dict(self.memory),
            "runner_up": _alternative_dict(self.runner_up),
            "other_grid": _alternative_dict(self.other_grid),
            "why_not": [_whatif_dict(answer) for answer in self.why_not],
            "restrictions": [{"option": r.option, "without": _alternative_dict(r.without)} for r in self.restrictions],
            "targets": dict(self.targets),
            "sensitivities": [_sensitivity_dict(item) for item in self.sensitivities],
        }


def explain(
    request: Request,
    *,
    why_not: Sequence[Mapping[str, str]] = (),
    deadline: Deadline | None = None,
    notify: Callable[[str], None] | None = None,
) -> Explanation:
    """Plan a request and ask of the plan what it owes to what.

    Args:
        request: what to plan.
        why_not: knobs to fix instead, one mapping for each question.
        deadline: when to stop with what is known by then.
        notify: told what is being solved.

    Raises:
        InputError: inputs that make no sense together.
        InfeasibleError: no plan fits; its ``relaxations`` say what would.
        StoppedError: the time ran out before a plan was found.
    """
    deadline, say = deadline or Deadline(), notify or (lambda _: None)
    say("the plan")
    planning = run(request, top=2, deadline=deadline)
    questions = []
    for asked in why_not:
        say(" ".join(f"{knob}={value}" for knob, value in asked.items()))
        questions.append(whatif(planning, asked, deadline))
    say("more memory")
    memory = memory_price(planning, deadline)
    say("other degrees")
    another = other_grid(planning, deadline)
    say("restrictions")
    restrictions = restriction_costs(planning, deadline)
    targets: Mapping[str, float | None] = {}
    if request.target is Target.ANY:
        targets = target_prices(planning, (Target.MEGATRON, Target.DEEPSPEED), deadline)
    say("other clusters and batches")
    return Explanation(
        planning=planning,
        memory=memory,
        runner_up=_runner_up(planning, another),
        other_grid=another,
        why_not=tuple(questions),
        restrictions=restrictions,
        targets=targets,
        sensitivities=sensitivities(planning, deadline),
        is_complete=not deadline.is_over(),
    )


def _runner_up(planning: Planning, other_grid: Alternative | None) -> Alternative | None:
    """The second best: where layers differ, plans of one (pp, micro-batches) count once, and another grid may be it."""
    found = [other_grid] if other_grid is not None else []  # first: where both are one plan, it is this one
    found += [compare(other, planning.plan) for other in planning.plans[1:2]]
    return min(found, key=lambda other: other.slower_proven, default=None)


# -- JSON --------------------------------------------------------------------------------------------------------------


def knob_values(plan: Plan) -> dict[str, int | str]:
    """The knobs that lead to a plan with one grid, for use with ``--fix``; ``pp`` alone where layers differ."""
    values: dict[str, int | str] = {"pp": plan.pp, "vpp": plan.virtual_stages}
    found = plan.uniform()
    if found is None:
        return values
    values |= {"tp": found.tp, "cp": found.cp, "dp": found.dp, "ep": found.ep, "etp": found.etp, "zero": found.zero}
    return values | {"mbs": plan.micro_batch_size, "microbatches": plan.num_microbatches}


def _alternative_dict(other: Alternative | None) -> dict[str, Any] | None:
    if other is None:
        return None
    plan = other.plan
    return {
        "grid": grid(plan),
        "knobs": knob_values(plan),
        "step_time_s": plan.step_time_s,
        "objective_s": plan.objective_s,
        "slower": other.slower,
        "slower_proven": other.slower_proven,
        "parts_s": dict(other.parts),
        "stage_bytes": [stage.peak_bytes for stage in plan.stages],
    }


def _memory_dict(memory: MemoryPrice | None) -> dict[str, Any] | None:
    if memory is None:
        return None
    return {
        "binds": memory.unlimited is not None,
        "next": _step_dict(memory.following),
        "unlimited": _step_dict(memory.unlimited),
    }


def _step_dict(step: MemoryStep | None) -> dict[str, Any] | None:
    if step is None:
        return None
    other = _alternative_dict(step.other)
    return {"limit_bytes": step.limit_bytes, "stages_over": list(step.stages), "other": other}


def _whatif_dict(answer: WhatIf) -> dict[str, Any]:
    return {
        "asked": dict(answer.asked),
        "verdict": str(answer.verdict),
        "reasons": list(answer.reasons),
        "stage": answer.stage,
        "over_bytes": answer.over_bytes,
        "other": _alternative_dict(answer.other),
    }


def _sensitivity_dict(item: Sensitivity) -> dict[str, Any]:
    plan = item.plan
    return {
        "changed": item.changed,
        "factor": item.factor,
        "value": item.value,
        "tokens_per_s": plan.tokens_per_s if plan is not None else None,
        "faster": item.faster if plan is not None else None,
        "grid": grid(plan) if plan is not None else None,
        "knobs": knob_values(plan) if plan is not None else None,
        "why_none": item.why_none or None,
    }
