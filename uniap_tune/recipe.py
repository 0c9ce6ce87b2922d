"""A training recipe somebody already has: what it trains, how, and with which parallel settings today."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from uniap_tune.cost.runtime import Runtime, overlaps_tensor
from uniap_tune.graph import LayerKind, LayerType, block_type
from uniap_tune.megatron.facts import MegatronFacts
from uniap_tune.plan import Plan
from uniap_tune.predict import Layers, Run
from uniap_tune.spec import Cluster, Job, Model, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target

# Devices from Blackwell on need no single work queue for tensor parallelism (arg:1474).
_BLACKWELL = "blackwell"


@dataclass(frozen=True, slots=True)
class Argument:
    """A Megatron argument of a recipe: its name without dashes, its values, and where it stands (``file:line``).

    ``unknown`` says why its value cannot be known without running the recipe.
    """

    name: str
    values: tuple[str, ...]
    where: str
    unknown: str = ""

    @property
    def value(self) -> str | bool:
        """``True`` for a switch, else the values as one text."""
        return " ".join(self.values) if self.values else True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterHints:
    """What a recipe says about where it runs; ``None``: nothing."""

    num_nodes: int | None = None
    devices_per_node: int | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """How to change a recipe's arguments: values to set, arguments to leave out, and the environment.

    Names are without dashes; ``True`` sets a switch, ``None`` unsets a variable.
    """

    values: Mapping[str, str | bool] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    environment: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing changes."""
        return not (self.values or self.removed or self.environment)


class Source(Protocol):
    """The file or files a recipe was read from; knows how to write them with other arguments."""

    @property
    def format(self) -> str:
        """What kind of recipe it is."""

    @property
    def name(self) -> str:
        """Its path, as messages show it."""

    def rewritten(self, changes: Changes, cluster: Cluster, header: str) -> dict[str, str]:
        """The files of the recipe with the changes, by name; unrelated lines stay as they are, byte for byte.

        Raises:
            InputError: a place that must change cannot be changed; names file and line.
        """

    def originals(self) -> dict[str, str]:
        """The texts of the files as they are, by the names :meth:`rewritten` uses."""

    def reread(self, files: Mapping[str, str]) -> Recipe:
        """The recipe that these files are (by the names of :meth:`rewritten`).

        Raises:
            InputError: they are none.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe in any of the known formats.

    Attributes:
        name: its path as given.
        model, job: what is trained, and how; tuning changes neither.
        arguments: its Megatron arguments by name, the ones that win.
        environment: variables it sets.
        runtime: properties of the training software that its arguments choose.
        hints: what it says about the cluster it was written for.
        expressible_zero: ZeRO stages its format can say.
        manages_environment: its launcher sets the variables that the parallel settings need.
        unsayable: arguments its format has no word for; the engine's own choice stands.
        for_virtual_stages: switches that virtual stages need, which Megatron-LM's own arguments imply.
        notes: what was assumed or left open, one sentence each.
    """

    name: str
    source: Source
    model: Model
    job: Job
    arguments: Mapping[str, Argument]
    environment: Mapping[str, str]
    runtime: Runtime
    hints: ClusterHints = field(default_factory=ClusterHints)
    expressible_zero: frozenset[int] = frozenset({0, 1, 2, 3})
    manages_environment: bool = False
    unsayable: frozenset[str] = frozenset()
    for_virtual_stages: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def overlaps_itself(self) -> bool:
        """Whether the format's engine overlaps data-parallel communication unasked."""
        return "overlap-grad-reduce" in self.unsayable

    def notes_on(self, cluster: Cluster) -> tuple[str, ...]:
        """Its notes, and for which other cluster than this one it was written."""
        nodes, devices = cluster.num_nodes, cluster.devices_per_node
        written = (self.hints.num_nodes or nodes, self.hints.devices_per_node or devices)
        if written == (nodes, devices):
            return self.notes
        return (*self.notes, f"the recipe was written for {written[0]} nodes with {written[1]} devices each")

    def facts(self, cluster: Cluster) -> MegatronFacts:
        """Its arguments as what the rules look at."""
        values = {name: argument.value for name, argument in self.arguments.items()}
        return self.facts_with(values, self.environment, cluster)

    def facts_with(
        self, arguments: Mapping[str, str | bool], environment: Mapping[str, str], cluster: Cluster
    ) -> MegatronFacts:
        """Other arguments for the same recipe as what the rules look at."""
        return MegatronFacts(
            arguments,
            world=cluster.num_devices,
            environment=environment,
            single_queue=not self.manages_environment and cluster.device.generation != _BLACKWELL,
        )


def unsaid(before: Recipe, after: Recipe, changes: Changes) -> list[str]:
    """What a recipe that was changed says other than the one before with the changes, one sentence each."""
    wanted = {name: argument.value for name, argument in before.arguments.items() if name not in changes.removed}
    wanted |= dict(changes.values)
    said = {name: argument.value for name, argument in after.arguments.items()}
    found = [f"--{name} would be left at {said[name]}" for name in said.keys() - wanted.keys()]
    found += [f"--{name} would be missing" for name in wanted.keys() - said.keys()]
    found += [f"--{name} would be {said[name]}" for name in said.keys() & wanted.keys() if said[name] != wanted[name]]
    for name, value in changes.environment.items():
        if after.environment.get(name) != value:
            found.append(f"{name} would be {after.environment.get(name)}")
    return sorted(found)


def today_run(recipe: Recipe, cluster: Cluster) -> Run:
    """The recipe as it is, on a cluster. Its arguments must break no rule of :mod:`uniap_tune.megatron.rules`.

    Data-parallel communication overlaps only where the arguments, or the format's engine, say so.
    """
    facts = recipe.facts(cluster)
    strategy = Strategy(
        tp=facts.tp,
        dp=facts.dp,
        cp=facts.cp,
        ep=facts.ep,
        etp=facts.etp,
        zero=facts.zero,
        sequence_parallel=facts.sequence_parallel,
    )
    mode = {"full": Recompute.FULL, "selective": Recompute.SELECTIVE}.get(facts.recompute, Recompute.NONE)
    leading = facts.count("recompute-num-layers") if facts.text("recompute-method") == "block" else None
    blocks, index = [], 0
    for size in facts.chunks:
        modes = [mode if leading is None or place < leading else Recompute.NONE for place in range(size)]
        blocks.append([(block_type(recipe.model, index + place), modes[place]) for place in range(size)])
        index += size
    run = _run(
        recipe,
        cluster,
        pp=facts.pp,
        strategy=strategy,
        blocks=blocks,
        micro_batch=facts.micro_batch,
        num_microbatches=facts.microbatches,
        group=facts.optional("microbatch-group-size-per-virtual-pipeline-stage"),
    )
    unasked = recipe.overlaps_itself or facts.zero > 1  # Megatron-FSDP does too
    capabilities = replace(
        run.capabilities,
        overlap_gradient_reduce=unasked or facts.on("overlap-grad-reduce"),
        overlap_param_gather=unasked or facts.on("overlap-param-gather"),
    )
    return replace(run, capabilities=capabilities)


def plans_runtime(recipe: Recipe, cluster: Cluster) -> Runtime:
    """The software of a recipe's plans: its own, and where that can (TransformerEngine's layers, not deterministic)
    also the overlap of tensor-parallel communication that plans are launched with."""
    runtime = recipe.runtime
    possible = runtime.transformer_engine and not runtime.deterministic
    overlaps = runtime.overlap_tensor or (possible and overlaps_tensor(recipe.model, cluster))
    return replace(runtime, overlap_tensor=overlaps)


def plan_run(recipe: Recipe, cluster: Cluster, plan: Plan) -> Run:
    """A plan for the recipe, to be priced by the same code as :func:`today_run`."""
    blocks, index = [], 0
    for chunk in plan.virtual_stage_blocks():
        modes = [strategy.recompute for strategy in chunk]
        blocks.append([(block_type(recipe.model, index + place), mode) for place, mode in enumerate(modes)])
        index += len(modes)
    return _run(
        replace(recipe, runtime=plans_runtime(recipe, cluster)),
        cluster,
        pp=plan.pp,
        strategy=plan.strategies[0],
        blocks=blocks,
        micro_batch=plan.micro_batch_size,
        num_microbatches=plan.num_microbatches,
    )


def _run(
    recipe: Recipe,
    cluster: Cluster,
    *,
    pp: int,
    strategy: Strategy,
    blocks: list[list[tuple[LayerType, Recompute]]],
    micro_batch: int,
    num_microbatches: int,
    group: int | None = None,
) -> Run:
    """A run whose chunks hold ``blocks``, with the embedding before the first and the head after the last."""
    ends = [(LayerType(kind=kind), Recompute.NONE) for kind in (LayerKind.EMBEDDING, LayerKind.HEAD)]
    parts = [list(chunk) for chunk in blocks]
    parts[0].insert(0, ends[0])
    parts[-1].append(ends[1])
    return Run(
        id=recipe.name,
        model=recipe.model,
        cluster=cluster,
        job=recipe.job,
        capabilities=CAPABILITIES[Target.MEGATRON],
        runtime=recipe.runtime,
        pp=pp,
        chunks=tuple(_grouped(part, strategy) for part in parts),
        micro_batch=micro_batch * strategy.dp,
        num_microbatches=num_microbatches,
        microbatch_group=group,
    )


def _grouped(chunk: list[tuple[LayerType, Recompute]], strategy: Strategy) -> tuple[Layers, ...]:
    """Neighbouring equal layers as one entry with their count."""
    groups: list[tuple[LayerType, Recompute, int]] = []
    for layer, mode in chunk:
        if groups and groups[-1][:2] == (layer, mode):
            groups[-1] = (layer, mode, groups[-1][2] + 1)
        else:
            groups.append((layer, mode, 1))
    if not groups:  # an empty stage still has a grid
        return (Layers(type=LayerType(kind=LayerKind.BLOCK), strategy=strategy, count=0),)
    return tuple(
        Layers(type=layer, strategy=replace(strategy, recompute=mode), count=count) for layer, mode, count in groups
    )
