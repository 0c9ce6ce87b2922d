"""The search space: which strategies are legal on the devices of a stage, and how a target groups them.

A *family* is a set of strategies of which one MIQP may mix any. For a target that runs one grid for the whole
model every grid is a family of its own; for ``any`` all strategies are one family.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType

from uniap_tune.accumulation import shards_alone, zero_refusal
from uniap_tune.autotp import tensor_refusal
from uniap_tune.errors import InputError
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.spec import Cluster, Job, Model, Recompute
from uniap_tune.strategy import Capabilities, Strategy, Target

KNOBS = ("pp", "vpp", "tp", "cp", "dp", "ep", "etp", "zero", "recompute", "mbs", "microbatches")

# Targets with one grid for all layers are tried with context parallelism from this sequence length on, or when there
# are more devices than samples. Below it the cost model sees gains of at most 3%, less than it is worth in trust: no
# record of it at such lengths confirms them [Empirical]. The per-layer space of the paper has none: with it the layouts
# of a layer multiply, so it is left out there unless asked for.
LONG_SEQUENCE = 8192
_MAX_CP = 8
# Virtual stages tried unless asked for: no published recipe has more [Empirical].
_MAX_VPP = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What the user fixed, capped or forbade, by name of :data:`KNOBS`. Recompute modes go by their names."""

    fix: Mapping[str, str] = field(default_factory=dict)
    maximum: Mapping[str, int] = field(default_factory=dict)
    forbid: frozenset[tuple[str, str]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fix", MappingProxyType(dict(self.fix)))
        object.__setattr__(self, "maximum", MappingProxyType(dict(self.maximum)))

    def allows(self, knob: str, value: int | str) -> bool:
        """Whether a knob may take this value."""
        text = str(value)
        if knob in self.fix and self.fix[knob] != text:
            return False
        if (knob, text) in self.forbid:
            return False
        return knob not in self.maximum or int(value) <= self.maximum[knob]


def parse_knobs(fix: list[str], maximum: list[str], forbid: list[str], option: str = "--fix") -> Knobs:
    """``["tp=8"]`` … as :class:`Knobs`; errors name what is fixed by ``option``.

    Raises:
        InputError: an unknown knob or a value that is none.
    """
    caps = {}
    for text in maximum:
        knob, value = _split(text, "--max")
        if knob == "recompute":
            raise InputError("--max recompute: recompute has no order", fix="use --forbid recompute=full")
        caps[knob] = int(value)
    names = [text.partition("=")[0] for text in fix]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{option} {twice} is given twice", fix="give each knob one value")
    return Knobs(
        fix=dict(_split(text, option) for text in fix),
        maximum=caps,
        forbid=frozenset(_split(text, "--forbid") for text in forbid),
    )


def _split(text: str, option: str) -> tuple[str, str]:
    knob, equals, value = text.partition("=")
    known = ", ".join(KNOBS)
    if not equals:
        raise InputError(f"{option} {text}: not of the form KNOB=VALUE", why=f"the knobs are {known}", fix="e.g. tp=8")
    if knob not in KNOBS:
        raise InputError(f"{option} {text}: there is no knob {knob!r}", fix=f"one of {known}")
    if knob == "recompute":
        if value not in set(Recompute):
            modes = ", ".join(Recompute)
            raise InputError(f"{option} {text}: unknown recompute mode {value!r}", fix=f"one of {modes}")
        return knob, value
    least, most = (0, 3) if knob == "zero" else (1, 999_999_999)
    if not value.isdecimal() or len(value) > 9 or not least <= int(value) <= most:
        allowed = "one of 0, 1, 2, 3" if knob == "zero" else "give a whole number above zero"
        raise InputError(f"{option} {text}: {value!r} is no possible value of {knob}", fix=allowed)
    return knob, str(int(value))


@dataclass(frozen=True, slots=True)
class Family:
    """Strategies one MIQP may mix, for transformer blocks; other layers use the same grids without recompute.

    ``leading``: the blocks recomputed in full are the first N of each stage (or model chunk), N to be chosen.
    ``virtual_stages``: model chunks on each stage, one for plain 1F1B.
    """

    blocks: tuple[Strategy, ...]
    leading: bool = False
    virtual_stages: int = 1

    def strategies(self, layer: LayerType) -> tuple[Strategy, ...]:
        """The choices of a layer of this type, simplest first."""
        choices: Iterable[Strategy] = self.blocks
        if layer.kind is not LayerKind.BLOCK:
            choices = (replace(s, recompute=Recompute.NONE) for s in choices)
        differ = len({(s.ep, s.etp) for s in self.blocks}) > 1
        if differ and not layer.moe:  # it has no experts, so that all grids of experts are one to it
            choices = (replace(s, ep=1, etp=1) for s in choices)
        return tuple(dict.fromkeys(choices))

    def most_leading(self, num_blocks: int, pp: int) -> int:
        """The largest N that is not recomputing every block, which is a family of its own; 0 without a leading rule."""
        if not self.leading:
            return 0
        return num_blocks - 1 if self.virtual_stages == 1 else num_blocks // (self.virtual_stages * pp)

    @property
    def grid(self) -> str:
        """Its one grid in short form, without recompute, or how many strategies it has."""
        grids = {replace(s, recompute=Recompute.NONE).describe() for s in self.blocks}
        return grids.pop() if len(grids) == 1 else f"{len(self.blocks)} strategies"

    @property
    def name(self) -> str:
        """Its grid, its virtual stages and how it recomputes."""
        modes = {s.recompute for s in self.blocks}
        text = f"{self.grid} vpp{self.virtual_stages}" if self.virtual_stages > 1 else self.grid
        if self.leading:
            return f"{text} rc-block"
        return text if len(modes) > 1 or modes == {Recompute.NONE} else f"{text} rc-{modes.pop()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The legal space of one job on one cluster for one target."""

    model: Model
    cluster: Cluster
    job: Job
    capabilities: Capabilities
    knobs: Knobs = field(default_factory=Knobs)

    def pipeline_sizes(self) -> list[int]:
        """Numbers of stages: divisors of the device count with at least one layer each, embedding and head counted."""
        layers = self.model.num_layers + 2
        return [p for p in divisors(self.cluster.num_devices) if p <= layers and self.knobs.allows("pp", p)]

    def microbatch_counts(self) -> list[int]:
        """Numbers of micro-batches: divisors of the global batch."""
        return [c for c in divisors(self.job.global_batch) if self.knobs.allows("microbatches", c)]

    def strategies(self, pp: int) -> list[Strategy]:
        """All legal strategies of a transformer block on the devices of a stage, simplest first."""
        found = [s for grid in self._grids(pp) for s in self._with_recompute(grid)]
        return sorted(found, key=lambda s: s.simplicity)

    def families(self, pp: int, num_microbatches: int) -> list[Family]:
        """The families of one (pp, c); strategies whose replicas cannot share a micro-batch evenly are left out."""
        samples = self.job.global_batch // num_microbatches
        usable = [s for s in self.strategies(pp) if samples % s.dp == 0 and self.knobs.allows("mbs", samples // s.dp)]
        if not usable:
            return []
        if not self.capabilities.uniform:
            return [Family(tuple(usable))] if self.knobs.allows("vpp", 1) else []
        families = [Family((s,)) for s in usable]
        if self.capabilities.leading_recompute:
            plain = {replace(s, recompute=Recompute.NONE): s for s in usable if s.recompute is Recompute.FULL}
            families += [Family((s, plain[s]), leading=True) for s in usable if s in plain]
        return [replace(f, virtual_stages=v) for v in self._virtual_stages(pp, num_microbatches) for f in families]

    def _virtual_stages(self, pp: int, num_microbatches: int) -> list[int]:
        """Numbers of model chunks on a stage. Interleaving needs micro-batches in multiples of the stages: Megatron's
        schedules.py deadlocks or pads otherwise."""
        found = [1] if self.knobs.allows("vpp", 1) else []
        if self.capabilities.interleaving and pp > 1 and num_microbatches % pp == 0:
            asked = "vpp" in self.knobs.fix or "vpp" in self.knobs.maximum
            most = (self.model.num_layers + 2) // pp
            found += [v for v in range(2, 1 + (most if asked else min(most, _MAX_VPP))) if self.knobs.allows("vpp", v)]
        return found

    def _grids(self, pp: int) -> Iterator[Strategy]:
        size = self.cluster.num_devices // pp
        zeros = self.zero_stages(pp)
        for tp in divisors(size):
            if not self._tensor_legal(tp, pp):
                continue
            for cp in divisors(size // tp):
                dp = size // (tp * cp)
                if not self._context_legal(cp) or not self.knobs.allows("dp", dp):
                    continue
                sequence_parallel = self.capabilities.sequence_parallel and tp > 1 and self._sequence_splits(tp * cp)
                for zero, (ep, etp) in product(sorted(zeros), self._expert_grids(tp, cp * dp, sequence_parallel)):
                    if not self._zero_legal(zero, dp * cp, pp):
                        continue
                    yield Strategy(tp=tp, cp=cp, dp=dp, ep=ep, etp=etp, zero=zero, sequence_parallel=sequence_parallel)

    def zero_stages(self, pp: int) -> frozenset[int]:
        """ZeRO stages of the engine with so many pipeline stages."""
        return self.capabilities.zero_with_pipeline if pp > 1 else self.capabilities.zero

    def zero_refusal(self, zero: int, pp: int) -> str:
        """Why the engine cannot train the job at a ZeRO stage; empty: it can."""
        tied_pipeline = self.model.tied_embeddings and pp > 1
        return zero_refusal(self.job, self.capabilities, zero, tied_pipeline=tied_pipeline)

    def _zero_legal(self, zero: int, replicas: int, pp: int) -> bool:
        """With one replica a ZeRO stage is left out where it would be ZeRO 0."""
        if not self.knobs.allows("zero", zero) or self.zero_refusal(zero, pp):
            return False
        return not zero or replicas > 1 or shards_alone(self.job, self.capabilities, zero=zero, pp=pp)

    def _expert_grids(self, tp: int, replicas: int, sequence_parallel: bool) -> list[tuple[int, int]]:
        """(ep, etp): which ranks of a stage share a set of experts. Experts are whole, or split as the rest is.

        Megatron trains experts with tp only if the sequence is parallel too (moe_layer.py:636), and splits no biases
        of experts (transformer_config.py:2611).
        """
        moe = self.model.moe
        grids = [(1, 1)]
        if moe is not None and self.capabilities.expert_parallel:
            grids = [
                (ep, etp)
                for etp in sorted({1, tp})
                for ep in divisors(moe.num_experts)
                if tp * replicas % (ep * etp) == 0
                and moe.expert_ffn_size % etp == 0
                and (etp == 1 or not self.model.mlp_bias)
                and (tp == 1 or sequence_parallel)
            ]
        return [(ep, etp) for ep, etp in grids if self.knobs.allows("ep", ep) and self.knobs.allows("etp", etp)]

    def _with_recompute(self, grid: Strategy) -> Iterator[Strategy]:
        for mode in sorted(self.capabilities.recompute & self.job.allowed_recompute):
            if mode is Recompute.SELECTIVE and self.job.flash_attention:
                continue  # FlashAttention already recomputes the attention core (arXiv 2205.14135)
            if self.knobs.allows("recompute", mode):
                yield replace(grid, recompute=mode)

    def _tensor_legal(self, tp: int, pp: int) -> bool:
        model = self.model
        if not self.knobs.allows("tp", tp):
            return False
        if tp == 1:
            return True
        if pp > 1 and not self.capabilities.tensor_with_pipeline:
            return False
        if self.capabilities.target is Target.DEEPSPEED and tensor_refusal(model, tp):
            return False
        asked = "tp" in self.knobs.fix or "tp" in self.knobs.maximum
        if tp > self.cluster.fast_domain and not asked:
            return False  # tensor parallelism across the slow network is tried only when asked for
        divides = model.num_heads % tp == 0 and model.ffn_size % tp == 0
        return divides and (model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0)

    def _context_legal(self, cp: int) -> bool:
        if cp == 1:
            return self.knobs.allows("cp", 1)
        job = self.job
        asked = "cp" in self.knobs.fix or "cp" in self.knobs.maximum
        long = job.seq_length >= LONG_SEQUENCE or self.cluster.num_devices > job.global_batch
        wanted = asked or (self.capabilities.uniform and long and cp <= _MAX_CP)
        return (
            wanted
            and self.capabilities.context_parallel
            and self.knobs.allows("cp", cp)
            and job.seq_length % (2 * cp) == 0
        )

    def _sequence_splits(self, ways: int) -> bool:
        return self.job.seq_length % ways == 0


def divisors(number: int) -> list[int]:
    """All divisors in rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
