"""Tune a recipe: price what it does today, plan the same job, and say what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from uniap_tune.deadline import Deadline
from uniap_tune.errors import InfeasibleError, InputError
from uniap_tune.megatron.facts import CONNECTIONS, MegatronFacts
from uniap_tune.megatron.rules import Violation, violations
from uniap_tune.megatron.versions import DEFAULT_VERSION, megatron_version
from uniap_tune.plan import Plan
from uniap_tune.planner import Planning, Request
from uniap_tune.planner import run as run_planner
from uniap_tune.predict import Prediction, predict
from uniap_tune.recipe import Changes, Recipe, plan_run, plans_runtime, today_run
from uniap_tune.render.megatron import megatron_launch
from uniap_tune.render.shell import Variable, number
from uniap_tune.spec import Cluster
from uniap_tune.strategy import Target

# A plan must be faster than today by more than this to be worth a change [Empirical]: differences below it are noise
# between two runs of one configuration.
LEAST_GAIN = 0.005

# What a plan decides. All of it that a plan does not set is taken out of the recipe.
DECIDED = frozenset(
    {
        "account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split", "context-parallel-size",
        "cp-comm-type", "data-parallel-sharding-strategy", "decoder-first-pipeline-num-layers",
        "decoder-last-pipeline-num-layers", "distribute-saved-activations", "expert-model-parallel-size",
        "expert-tensor-parallel-size", "hierarchical-context-parallel-sizes", "init-model-with-meta-device",
        "micro-batch-size",
        "microbatch-group-size-per-virtual-pipeline-stage", "no-overlap-p2p-communication",
        "num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank", "overlap-grad-reduce",
        "overlap-p2p-communication-warmup-flush", "overlap-param-gather", "overlap-param-gather-with-optimizer-step",
        "pipeline-model-parallel-layout", "pipeline-model-parallel-size", "recompute-activations",
        "recompute-granularity", "recompute-method", "recompute-modules", "recompute-num-layers", "sequence-parallel",
        "tensor-model-parallel-size", "use-custom-fsdp", "use-distributed-optimizer", "use-megatron-fsdp",
        "use-torch-fsdp2",
    }
)  # fmt: skip

# Degrees of one need no argument; where a recipe has another, it is set to one.
_DEGREES = ("context-parallel-size", "expert-model-parallel-size", "expert-tensor-parallel-size")

# Optional features that a plan may rule out, by the rule they break.
_FEATURES: Mapping[str, tuple[str, ...]] = {
    "overlap_needs_sequence_parallel": ("tp-comm-overlap",),
    "overlap_is_not_deterministic": ("tp-comm-overlap",),
    "expert_overlap": ("overlap-moe-expert-parallel-comm", "delay-wgrad-compute"),
    "optimizer_instances": ("num-distributed-optimizer-instances",),
    "offloaded_layers": ("cpu-offloading-num-layers",),
}

# Rules about how something is run, not about what: a recipe that breaks only these can still be priced.
PRICEABLE = frozenset({"one_queue", "fsdp_queues", "fsdp_checkpoint", "recompute_fits_chunk", *_FEATURES})


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What settings take on the cluster. ``room_bytes``: by stage, what is left of the usable memory (may be < 0)."""

    prediction: Prediction
    room_bytes: tuple[float, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage has room."""
        return min(self.room_bytes) >= 0

    @property
    def worst_stage(self) -> int:
        """The stage with the least room."""
        return self.room_bytes.index(min(self.room_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """The answer of ``tune``.

    Attributes:
        today: what the recipe takes as it is; ``None`` if it cannot run at all, for which see ``broken``.
        broken: Megatron's rules that it breaks today.
        planning, tuned: the plan and what it takes; ``None`` if nothing better than today was found.
        changes: what to change in the recipe.
    """

    recipe: Recipe
    request: Request
    today: Configuration | None
    broken: tuple[Violation, ...]
    planning: Planning | None
    tuned: Configuration | None
    changes: Changes

    @property
    def is_kept(self) -> bool:
        """Whether the recipe stays as it is."""
        return self.planning is None

    @property
    def speedup(self) -> float | None:
        """How many times as many steps the tuned recipe makes; ``None`` if today's does not run."""
        if self.today is None or self.broken or not self.today.fits:
            return None
        tuned = self.tuned or self.today
        return self.today.prediction.step_time_s / tuned.prediction.step_time_s


def tuning_request(request: Request, recipe: Recipe) -> Request:
    """The request that plans a recipe: only what its format and its arguments can say."""
    facts = recipe.facts(request.cluster)
    zero = set(recipe.expressible_zero)
    if any(facts.on(name) for name in ("use-precision-aware-optimizer", "fp8-param-gather")):
        zero.discard(0)
    forbidden = frozenset(("zero", str(stage)) for stage in range(4) if stage not in zero)
    knobs = replace(request.knobs, forbid=request.knobs.forbid | forbidden)
    return replace(request, knobs=knobs, target=Target.MEGATRON, runtime=plans_runtime(recipe, request.cluster))


def tune(
    recipe: Recipe, request: Request, *, deadline: Deadline | None = None, version: str = DEFAULT_VERSION
) -> Tuning:
    """Plan a recipe's job anew, for a version of Megatron-LM, and compare with today.

    Raises:
        InputError: the job and the cluster do not go together, or the plan cannot be said in this recipe.
        InfeasibleError: neither today's settings nor any plan fit.
    """
    request = tuning_request(request, recipe)
    facts = recipe.facts(request.cluster)
    broken = violations(facts)
    today = _price_today(recipe, request, broken)
    runs = today is not None and today.fits and not broken
    unchanged = Tuning(
        recipe=recipe, request=request, today=today, broken=broken, planning=None, tuned=None, changes=Changes()
    )
    try:
        planning = run_planner(request, deadline=deadline)
    except InfeasibleError:
        if runs:
            return unchanged
        raise
    tuned = _configuration(predict(plan_run(recipe, request.cluster, planning.plan)), request)
    if runs and today is not None:
        limit = today.prediction.step_time_s * (1 - LEAST_GAIN)
        if tuned.prediction.step_time_s > limit:
            return unchanged
    changes = changes_for(recipe, planning.plan, request.cluster, version)
    return replace(unchanged, planning=planning, tuned=tuned, changes=changes)


def _price_today(recipe: Recipe, request: Request, broken: tuple[Violation, ...]) -> Configuration | None:
    if any(violation.rule.name not in PRICEABLE for violation in broken):
        return None
    return _configuration(predict(today_run(recipe, request.cluster)), request)


def _configuration(prediction: Prediction, request: Request) -> Configuration:
    usable = request.memory_limit_bytes - prediction.overhead_bytes
    return Configuration(
        prediction=prediction, room_bytes=tuple(usable - held for held in prediction.memory_bytes_per_stage)
    )


def changes_for(recipe: Recipe, plan: Plan, cluster: Cluster, version: str = DEFAULT_VERSION) -> Changes:
    """What to change in a recipe so that it runs a plan; empty if it does already.

    Raises:
        InputError: other arguments of the recipe forbid the plan.
    """
    launch = megatron_launch(plan, recipe.model, cluster, recipe.job, version)
    wanted: dict[str, str | bool] = {}
    for group in ("PARALLEL", "BATCH", "SHARDING", "RECOMPUTE"):
        for flag, value in launch.groups.get(group, {}).items():
            plain = value.default if isinstance(value, Variable) else value
            wanted[flag.removeprefix("--")] = True if plain is True else number(plain)
    if not plans_runtime(recipe, cluster).overlap_tensor:
        wanted.pop("tp-comm-overlap", None)
    if plan.virtual_stages > 1:
        wanted |= dict.fromkeys(sorted(recipe.for_virtual_stages), True)
    today = {name: argument.value for name, argument in recipe.arguments.items()}
    _use_own_words(wanted, today)
    for name in _DEGREES:
        if name in today:
            wanted.setdefault(name, "1")
    said = {name for name, value in wanted.items() if _is_said(today, name, value)}
    values = {name: value for name, value in wanted.items() if name not in said | recipe.unsayable}
    decided = DECIDED | recipe.for_virtual_stages
    removed = {name for name in today if name in decided and name not in wanted} - recipe.unsayable
    if wanted.get("tensor-model-parallel-size") == "1":
        removed.discard("sequence-parallel")  # Megatron switches it off itself (arg:1433)
    if today.get("ckpt-format") == "fsdp_dtensor" and "ckpt-format" not in wanted:
        removed.add("ckpt-format")
    environment = _environment(recipe, launch.environment)
    changes = Changes(values, frozenset(removed), environment)
    return _without_conflicts(recipe, changes, cluster)


def unknown_arguments(recipe: Recipe, version: str = DEFAULT_VERSION) -> list[str]:
    """Arguments of a recipe that a version of Megatron-LM does not know, each with its place.

    They stay in the recipe: its training script may know them itself. NeMo and Megatron-Bridge have their own names.
    """
    if recipe.manages_environment:
        return []
    known = megatron_version(version).arguments
    return [f"--{name} ({found.where})" for name, found in recipe.arguments.items() if name not in known]


def _is_said(today: Mapping[str, str | bool], name: str, value: str | bool) -> bool:
    """Whether the recipe says it already, or it is the default of an argument the recipe leaves out."""
    if name in today:
        return today[name] == value
    return value == "1" and name.endswith("-model-parallel-size")


def _use_own_words(wanted: dict[str, str | bool], today: Mapping[str, str | bool]) -> None:
    """Says the same as the recipe does where there are two ways."""
    chunks = wanted.get("num-virtual-stages-per-pipeline-rank")
    if chunks is not None and "num-layers-per-virtual-pipeline-stage" in today:
        parts = int(chunks) * int(wanted["pipeline-model-parallel-size"])
        del wanted["num-virtual-stages-per-pipeline-rank"]
        wanted["num-layers-per-virtual-pipeline-stage"] = str(int(today["num-layers"]) // parts)
    grid = "expert-tensor-parallel-size"  # the default is the degree of attention (arg:587)
    if grid not in today and wanted.get(grid) == wanted["tensor-model-parallel-size"]:
        del wanted[grid]


def _environment(recipe: Recipe, wanted: Mapping[str, str | None]) -> dict[str, str | None]:
    """Changes of the one variable that the parallel settings decide."""
    if CONNECTIONS not in wanted or recipe.manages_environment:
        return {}
    value, today = wanted[CONNECTIONS], recipe.environment.get(CONNECTIONS)
    return {} if value == today else {CONNECTIONS: value}


def after(recipe: Recipe, changes: Changes, cluster: Cluster) -> MegatronFacts:
    """The recipe's arguments with the changes made."""
    arguments = {
        name: argument.value for name, argument in recipe.arguments.items() if name not in changes.removed
    } | dict(changes.values)
    environment = {**recipe.environment, **changes.environment}
    kept = {name: value for name, value in environment.items() if value is not None}
    return recipe.facts_with(arguments, kept, cluster)


def _without_conflicts(recipe: Recipe, changes: Changes, cluster: Cluster) -> Changes:
    """Also takes out optional features that the plan rules out."""
    broken = violations(after(recipe, changes, cluster))
    features = {name for violation in broken for name in _FEATURES.get(violation.rule.name, ())}
    present = frozenset(name for name in features if name in recipe.arguments)
    if present:
        changes = replace(changes, removed=changes.removed | present)
        broken = violations(after(recipe, changes, cluster))
    if broken:
        raise InputError(
            f"{recipe.name}: its other arguments forbid the plan",
            why="; ".join(str(violation) for violation in broken),
            fix="correct them, or fix the degrees in question with --fix",
        )
    return changes
