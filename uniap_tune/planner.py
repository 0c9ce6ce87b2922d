"""Plan one job: validate, price, search, assemble. The Python API and every command go through here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from uniap_tune.adapters.cluster import describe
from uniap_tune.adapters.plan_json import PlanFile
from uniap_tune.assemble import assemble
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.runtime import Runtime
from uniap_tune.deadline import Deadline
from uniap_tune.errors import InfeasibleError, InputError, StoppedError, TuneError
from uniap_tune.formulate import Pricer
from uniap_tune.graph import build_graph
from uniap_tune.legality import conflict, restrictions
from uniap_tune.parallel import search_with
from uniap_tune.plan import Plan
from uniap_tune.problem import Status, evaluate
from uniap_tune.relax import memory_needed, relaxations
from uniap_tune.search import Candidate, Progress, SearchOptions, SearchResult, search
from uniap_tune.simulate import recompute
from uniap_tune.solvers import AUTO, COLUMNS, solve, solver_named
from uniap_tune.space import Knobs, Space, parse_knobs
from uniap_tune.spec import Cluster, Job, Model, Position
from uniap_tune.strategy import CAPABILITIES, Target
from uniap_tune.targets import require_supported
from uniap_tune.units import format_bytes

# The gap a plan is proven to; within it the simulated step decides.
RERANK_GAP = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to plan. ``memory_fraction`` overrides the cluster's, ``runtime`` the target's usual software."""

    model: Model
    cluster: Cluster
    job: Job
    target: Target = Target.MEGATRON
    knobs: Knobs = field(default_factory=Knobs)
    memory_fraction: float | None = None
    runtime: Runtime | None = None

    @property
    def memory_limit_bytes(self) -> float:
        """Bytes of a device a plan may use, what is reserved for the framework included."""
        fraction = self.memory_fraction or self.cluster.memory_fraction
        if fraction is None:  # what the measured error of predicted peaks leaves
            fraction = CostModel(self.model, self.cluster, self.job, CAPABILITIES[self.target]).memory_fraction()
        return fraction * self.cluster.device.memory_bytes

    def with_memory_limit(self, limit_bytes: float) -> Request:
        """The same request with so many bytes of every device usable."""
        return replace(self, memory_fraction=limit_bytes / self.cluster.device.memory_bytes)

    def describe(self) -> dict[str, Any]:
        """JSON-ready inputs and their hash; equal inputs give equal text."""
        inputs: dict[str, Any] = {
            "model": _plain(asdict(self.model)),
            "cluster": describe(self.cluster),
            "job": _plain(asdict(self.job)),
            "target": str(self.target),
            "fix": dict(self.knobs.fix),
            "max": dict(self.knobs.maximum),
            "forbid": sorted(f"{knob}={value}" for knob, value in self.knobs.forbid),
            "memory_limit_bytes": self.memory_limit_bytes,
        }
        text = json.dumps(inputs, sort_keys=True)
        return {**inputs, "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Planning:
    """The plans found, best first, and how they were found; ``prices`` serve to solve again."""

    request: Request
    plans: tuple[Plan, ...]
    result: SearchResult
    space: Space
    prices: Pricer

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.plans[0]


def plan(
    model: Model,
    cluster: Cluster,
    job: Job,
    *,
    target: Target | str = Target.MEGATRON,
    knobs: Knobs | None = None,
    memory_fraction: float | None = None,
    time_limit: float | None = None,
) -> Plan:
    """The best plan for a job.

    Args:
        model, cluster, job: see :mod:`uniap_tune.spec`.
        target: ``megatron``, ``deepspeed`` or ``any``.
        knobs: degrees to fix, cap or forbid.
        memory_fraction: part of each device's memory a plan may use.
        time_limit: seconds after which the best plan so far is returned with its gap.

    Raises:
        InputError: inputs that make no sense together.
        InfeasibleError: no plan fits; its ``relaxations`` say what would.
        StoppedError: the time ran out before a plan was found.
    """
    request = Request(
        model=model,
        cluster=cluster,
        job=job,
        target=Target(target),
        knobs=knobs or Knobs(),
        memory_fraction=memory_fraction,
    )
    return run(request, deadline=Deadline.after(time_limit)).plan


def request_of(found: PlanFile, where: str) -> Request:
    """The request that a written plan was made from; ``where`` names its file.

    Raises:
        InputError: its inputs are not complete, or were changed by hand to something else.
    """
    inputs = found.plan.inputs
    try:
        fix, maximum = ([f"{knob}={value}" for knob, value in inputs[name].items()] for name in ("fix", "max"))
        knobs, limit = parse_knobs(fix, maximum, list(inputs["forbid"])), float(inputs["memory_limit_bytes"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: inputs is not what a plan was made from: {type(error).__name__}: {error}",
            fix="write the plan again with `uniap-tune plan … -o DIR`",
        ) from None
    usual = Request(model=found.model, cluster=found.cluster, job=found.job, target=found.plan.target, knobs=knobs)
    return usual if usual.memory_limit_bytes == limit else usual.with_memory_limit(limit)


def run(
    request: Request,
    *,
    top: int = 1,
    deadline: Deadline | None = None,
    solver: str = AUTO,
    near: float = RERANK_GAP,
    jobs: int = 1,
    notify: Callable[[Progress], None] | None = None,
    prices: Pricer | None = None,
    within: Space | None = None,
) -> Planning:
    """Plan a request; see :func:`plan` for what it raises.

    Args:
        request: what to plan.
        top: how many different plans to return.
        deadline: when to stop.
        solver: ``auto``, ``highs`` or ``cbc``.
        near: plans within this relative distance of the optimum are ranked by their simulated step.
        jobs: processes.
        notify: told of the progress (with one process).
        prices: see :func:`build`.
        within: the part of the request's space to search; by default all of it.
    """
    planning = attempt(
        request,
        top=top,
        deadline=deadline,
        solver=solver,
        near=near,
        jobs=jobs,
        notify=notify,
        prices=prices,
        within=within,
    )
    if planning.result.status is Status.INFEASIBLE:
        raise infeasible(request, planning.space, planning.prices)
    if not planning.plans:
        raise StoppedError("stopped before a plan was found", fix="give it more time, or no --time-limit")
    return planning


def attempt(
    request: Request,
    *,
    top: int = 1,
    deadline: Deadline | None = None,
    solver: str = AUTO,
    near: float = RERANK_GAP,
    jobs: int = 1,
    notify: Callable[[Progress], None] | None = None,
    prices: Pricer | None = None,
    within: Space | None = None,
) -> Planning:
    """As :func:`run`, but where nothing fits or is found in time, the answer has no plans.

    Raises:
        InputError: inputs that make no sense together.
    """
    validate(request)
    space, pricer = build(request, prices=prices)
    space = within or space
    options = SearchOptions(
        top=top,
        window=near,
        deadline=deadline or Deadline(),
        solve=solver_named(solver),
        solver=solver,
        notify=notify,
    )
    result = search(space, pricer, options) if jobs == 1 else search_with(space, pricer, options, jobs)
    inputs, notes, limit = request.describe(), assumptions(request, pricer.costs), request.memory_limit_bytes
    plans = [
        assemble(
            candidate,
            graph=pricer.graph,
            costs=pricer.costs,
            cluster=request.cluster,
            job=request.job,
            target=request.target,
            memory_limit_bytes=limit,
            bound_s=result.bound_s,
            status=str(result.status),
            inputs=inputs,
            assumptions=notes,
        )
        for candidate in _worth_showing(result, top, near)
    ]
    order = _by_simulation(plans, near)
    shown = tuple(plans[i] for i in order[:top])
    return Planning(request=request, plans=shown, result=result, space=space, prices=pricer)


def _worth_showing(result: SearchResult, top: int, near: float) -> list[Candidate]:
    """The best ``top`` candidates and all that are near the best."""
    best = result.candidates[0].objective_s if result.candidates else 0.0
    return [x for i, x in enumerate(result.candidates) if i < top or x.objective_s <= best * (1 + near)]


def _by_simulation(plans: Sequence[Plan], near: float) -> list[int]:
    """Order of the plans: those near the optimum by their simulated step, which sees what the closed form hides."""
    last = plans[0].objective_s * (1 + near) if plans else 0.0

    def rank(i: int) -> tuple[bool, float, int]:
        is_near = plans[i].objective_s <= last
        return (not is_near, plans[i].step_time_s if is_near else plans[i].objective_s, i)

    return sorted(range(len(plans)), key=rank)


def certify(planning: Planning) -> dict[str, Any]:
    """Prove the optimum of the winner's (pp, c, family) a second time, by the method that did not find it.

    Raises:
        TuneError: the two methods disagree (a bug).
    """
    candidate = planning.result.candidates[0]
    problem = candidate.formulation.problem
    found = evaluate(problem, candidate.assignment).objective_s
    by_milp = planning.result.solver == AUTO
    second = solve(problem, "highs" if by_milp else COLUMNS)
    checked = recompute(problem, candidate.assignment)
    same = abs(second.objective_s - found) <= 1e-7 * found and abs(checked.objective_s - found) <= 1e-9 * found
    if not same or not checked.feasible:
        raise TuneError(
            f"certificate: {found} s by one method, {second.objective_s} s by the other",
            why=f"recomputed: {checked.objective_s} s, feasible: {checked.feasible}",
            fix="please report this with the command and its inputs",
        )
    return {
        "method": "master MILP on HiGHS" if by_milp else "stage columns",
        "objective_s": second.objective_s,
        "bound_s": second.bound_s,
        "recomputed_objective_s": checked.objective_s,
        "recomputed_feasible": checked.feasible,
    }


def build(request: Request, *, prices: Pricer | None = None) -> tuple[Space, Pricer]:
    """The search space of a request and the prices of its layers.

    ``prices`` are used instead: of a request with the same model, cluster and job, whatever its knobs and its memory
    limit. Where its target is another, layers are priced as that target's engine runs them.
    """
    if prices is None:
        engine = CAPABILITIES[request.target]
        costs = CostModel(request.model, request.cluster, request.job, engine, runtime=request.runtime)
        prices = Pricer(build_graph(request.model), costs, request.job.global_batch, math.inf)
    costs = prices.costs
    limit = request.memory_limit_bytes - costs.reserved_bytes()
    if limit <= 0:
        reserved = format_bytes(costs.reserved_bytes())
        raise InputError(
            f"--memory-fraction leaves {format_bytes(request.memory_limit_bytes)} of each device",
            why=f"the framework alone needs {reserved}",
            fix="give a larger fraction",
        )
    return _space(request), prices.with_limit(limit)


def _space(request: Request) -> Space:
    return Space(
        model=request.model,
        cluster=request.cluster,
        job=request.job,
        capabilities=CAPABILITIES[request.target],
        knobs=request.knobs,
    )


def validate(request: Request) -> None:
    """Raise :class:`InputError` for inputs that cannot be planned together."""
    model, job, device = request.model, request.job, request.cluster.device
    if model.position is Position.LEARNED and model.max_positions and job.seq_length > model.max_positions:
        raise InputError(
            f"--seq-length {job.seq_length}: {model.name} has {model.max_positions} learned positions",
            fix=f"use at most {model.max_positions}",
        )
    if job.precision.compute not in device.peak_flops:
        known = ", ".join(device.peak_flops)
        raise InputError(
            f"{device.name} has no {job.precision.compute} arithmetic", fix=f"give --precision one of {known}"
        )
    require_supported(model, job, request.target)
    _require_strategies(request)


def _require_strategies(request: Request) -> None:
    """The batch, the devices and the knobs must leave at least one legal strategy."""
    found = conflict(_space(request))
    if found is None:
        return
    batch, devices = request.job.global_batch, request.cluster.num_devices
    asked = " ".join(restrictions(found.knobs))
    if asked:
        raise InputError(
            f"no strategy is left with {asked} on {devices} devices and a global batch of {batch}",
            why="; ".join(found.reasons),
            fix="loosen --fix, --max or --forbid",
        )
    raise InputError(
        f"--global-batch {batch} cannot be divided over {devices} devices",
        why=f"{request.model.name} allows no tensor and pipeline degrees that leave a data-parallel degree dividing it",
        fix=f"use a multiple of {devices}",
    )


def infeasible(request: Request, space: Space, pricer: Pricer) -> InfeasibleError:
    """The error for a request that nothing fits: what is missing, and what would help."""
    limit = request.memory_limit_bytes
    needed = memory_needed(space, pricer) + pricer.costs.reserved_bytes()
    chunks = request.knobs.fix.get("vpp", "1")
    if needed <= limit and chunks != "1":  # memory was counted without virtual stages
        return InfeasibleError(
            f"{request.model.name} cannot be interleaved with {chunks} chunks on each stage",
            why="its layers cannot be cut into so many chunks of nearly one length that fit",
            relaxations=(f"without --fix vpp={chunks}",),
            fix="change the following",
        )
    return InfeasibleError(
        f"{request.model.name} does not fit on {request.cluster.name}",
        why=f"the leanest plan needs {format_bytes(needed)} on a device, {format_bytes(limit)} are usable",
        relaxations=relaxations(space, pricer, limit),
        fix="change one of the following",
    )


def assumptions(request: Request, costs: CostModel) -> tuple[str, ...]:
    """What the answer supposes and leaves out, one sentence each."""
    notes = [
        "Times come from an analytic cost model; nothing was measured on this cluster.",
        f"Of measured runs like this, 4 of 5 took within {costs.time_band():.0%} of their predicted times.",
        "The step time shown is simulated event by event.",
        "Data loading, checkpointing, evaluation and stragglers are left out.",
    ]
    if request.target is Target.ANY:
        notes.append("A strategy for each layer is the full space of the paper; no engine runs all of it today.")
        notes.append("Context parallelism is left out of it unless asked for with --max cp=N.")
    if request.model.moe is not None:
        notes.append("Experts are balanced.")
    return tuple(notes)


def _plain(value: Any) -> Any:
    """Values as JSON has them: sets sorted, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
