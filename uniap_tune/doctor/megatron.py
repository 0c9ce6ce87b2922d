"""A Megatron configuration of any format as a :class:`~uniap_tune.doctor.setup.Setup`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from uniap_tune.doctor.setup import Option
from uniap_tune.megatron.facts import CONNECTIONS, MegatronFacts
from uniap_tune.megatron.rules import violations
from uniap_tune.predict import Run
from uniap_tune.recipe import Argument, Recipe, today_run
from uniap_tune.spec import Cluster, Job, Model
from uniap_tune.tuning import PRICEABLE

# Values to give arguments; ``None`` takes an argument out.
Values = Mapping[str, str | bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronSetup:
    """A recipe on a cluster."""

    recipe: Recipe
    cluster: Cluster

    @property
    def name(self) -> str:
        """The recipe's path."""
        return self.recipe.name

    @property
    def format(self) -> str:
        """What kind of recipe it is."""
        return self.recipe.source.format

    @property
    def engine(self) -> str:
        """Who runs it."""
        return "Megatron"

    @property
    def model(self) -> Model:
        """What is trained."""
        return self.recipe.model

    @property
    def job(self) -> Job:
        """How it is trained."""
        return self.recipe.job

    @property
    def facts(self) -> MegatronFacts:
        """Its arguments."""
        return self.recipe.facts(self.cluster)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, and for which other cluster it was written."""
        return self.recipe.notes_on(self.cluster)

    @property
    def broken(self) -> tuple[tuple[str, str], ...]:
        """The rules of Megatron it breaks."""
        return tuple((violation.rule.name, str(violation)) for violation in violations(self.facts))

    @property
    def runs(self) -> bool:
        """Whether what is broken leaves open what is run."""
        facts = self.facts
        return facts.microbatches > 0 and all(v.rule.name in PRICEABLE for v in violations(facts))

    @property
    def overlaps_itself(self) -> bool:
        """Whether the format's engine overlaps data-parallel communication unasked."""
        return self.recipe.overlaps_itself

    @property
    def settings(self) -> Mapping[str, str]:
        """Its parallel settings."""
        facts = self.facts
        found = {
            "pp": str(facts.pp), "tp": str(facts.tp), "cp": str(facts.cp), "dp": str(facts.dp), "ep": str(facts.ep),
            "etp": str(facts.etp), "vpp": str(virtual_of(facts) or "?"), "zero": str(facts.zero),
            "micro-batch": str(facts.micro_batch), "micro-batches": str(facts.microbatches),
        }  # fmt: skip
        if facts.tp > 1:
            found["sequence parallel"] = "on" if facts.sequence_parallel else "off"
        found["recompute"] = _recompute(facts)
        found["layers"] = _split(facts)
        found["overlap"] = self._overlap(facts)
        return found

    def _overlap(self, facts: MegatronFacts) -> str:
        if self.overlaps_itself:
            return "on"
        gradients, parameters = facts.on("overlap-grad-reduce"), facts.on("overlap-param-gather")
        return "on" if gradients and (parameters or not facts.zero) else "gradients only" if gradients else "off"

    def run(self) -> Run:
        """The recipe as it is."""
        return today_run(self.recipe, self.cluster)

    def changed(self, setting: str, values: Values, *, job: Job | None = None) -> Option:
        """The option of giving arguments other values. The work queues that the degrees need come with it."""
        today = {name: argument.value for name, argument in self.recipe.arguments.items()}
        wanted = {name: value for name, value in values.items() if value is not None and today.get(name) != value}
        removed = sorted(name for name, value in values.items() if value is None and name in today)
        kept = {name: argument for name, argument in self.recipe.arguments.items() if name not in removed}
        arguments = kept | {name: _argument(name, value) for name, value in wanted.items()}
        runtime = replace(self.recipe.runtime, overlap_tensor="tp-comm-overlap" in arguments)
        recipe = replace(self.recipe, arguments=arguments, job=job or self.recipe.job, runtime=runtime)
        environment = self._queues(recipe)
        if environment:
            merged = {**self.recipe.environment, **environment}
            recipe = replace(recipe, environment={name: value for name, value in merged.items() if value is not None})
        edits = [f"--{name}" if value is True else f"--{name} {value}" for name, value in wanted.items()]
        edits += [f"without --{name}" for name in removed]
        edits += [f"unset {name}" if value is None else f"{name}={value}" for name, value in environment.items()]
        return Option(setting=setting, edits=tuple(edits), setup=replace(self, recipe=recipe))

    def _queues(self, recipe: Recipe) -> dict[str, str | None]:
        """``CUDA_DEVICE_MAX_CONNECTIONS`` as other degrees need it, unless it is wrong already (that is a finding)."""
        before, after = self.facts, recipe.facts(self.cluster)
        if recipe.manages_environment or not after.single_queue:
            return {}
        value = self.recipe.environment.get(CONNECTIONS)
        if after.zero > 1:
            return {CONNECTIONS: None} if value == "1" and before.zero <= 1 else {}
        alone = before.tp * before.cp == 1 or before.zero > 1
        return {CONNECTIONS: "1"} if after.tp * after.cp > 1 and alone and value != "1" else {}


def _argument(name: str, value: str | bool) -> Argument:
    return Argument(name, () if value is True else (str(value),), "")


def virtual_of(facts: MegatronFacts) -> int | None:
    """Chunks of a stage; ``None`` where the layout is broken, which a rule says."""
    try:
        return facts.virtual
    except ValueError:
        return None


def chunks_of(facts: MegatronFacts) -> tuple[int, ...]:
    """Layers of each chunk; empty where the arguments are at odds, which a rule says."""
    try:
        return facts.chunks
    except ValueError:
        return ()


def _recompute(facts: MegatronFacts) -> str:
    if facts.recompute != "full":
        return facts.recompute or "none"
    if facts.text("recompute-method") == "block":
        return f"first {facts.count('recompute-num-layers')} of each chunk"
    return "full"


def _split(facts: MegatronFacts) -> str:
    """Blocks of each chunk: ``4-5-5-4``, ``4 x 8`` where they are equal, ``?`` where they are not known."""
    chunks = chunks_of(facts)
    if not chunks:
        return "?"
    if len(set(chunks)) == 1:
        return f"{len(chunks)} x {chunks[0]}"
    return "-".join(str(size) for size in chunks)
