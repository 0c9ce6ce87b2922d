"""Single changes of a Megatron configuration: one setting, or one factor moved from one degree to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from uniap_tune.doctor.megatron import MegatronSetup, Values, chunks_of, virtual_of
from uniap_tune.doctor.setup import Option
from uniap_tune.megatron.facts import SHARDING_OF_ZERO
from uniap_tune.render.layout import pipeline_arguments
from uniap_tune.space import LONG_SEQUENCE, divisors

# Degrees by their short names; the data-parallel degree is what they leave.
_DEGREES = {
    "tp": "tensor-model-parallel-size",
    "pp": "pipeline-model-parallel-size",
    "cp": "context-parallel-size",
    "ep": "expert-model-parallel-size",
    "etp": "expert-tensor-parallel-size",
}
_TRADES = (("tp", "dp"), ("tp", "pp"), ("tp", "cp"), ("pp", "dp"), ("cp", "dp"), ("pp", "cp"))
_SPLIT = (
    "pipeline-model-parallel-layout", "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers",
    "account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split",
)  # fmt: skip
_CHUNKS, _CHUNK_SIZE = "num-virtual-stages-per-pipeline-rank", "num-layers-per-virtual-pipeline-stage"
_GROUP = "microbatch-group-size-per-virtual-pipeline-stage"
_RECOMPUTE = (
    "recompute-granularity", "recompute-activations", "recompute-method", "recompute-num-layers", "recompute-modules",
    "distribute-saved-activations",
)  # fmt: skip
_FSDP = ("use-megatron-fsdp", "use-custom-fsdp", "use-torch-fsdp2", "data-parallel-sharding-strategy",
         "init-model-with-meta-device")  # fmt: skip
# Chunks of a stage and layers off the outer stages that are tried [Empirical]: more never paid.
_MOST_CHUNKS = 12
_MOST_LAYERS_MOVED = 3


def megatron_moves(setup: MegatronSetup) -> Iterator[Option]:
    """Every single change worth pricing."""
    yield from trades(setup)
    yield from micro_batches(setup)
    yield from recomputation(setup)
    yield from sharding(setup)
    yield from overlaps(setup)
    yield from sequence_parallel(setup)
    yield from virtual_stages(setup)
    yield from balanced(setup)
    yield from experts(setup)


def _without(names: Sequence[str]) -> dict[str, str | bool | None]:
    return dict.fromkeys(names, None)


def _degree(setup: MegatronSetup, axis: str, size: int) -> Values:
    name = _DEGREES[axis]
    return {} if size == 1 and name not in setup.recipe.arguments else {name: str(size)}


def trades(setup: MegatronSetup) -> Iterator[Option]:
    """Factors between two of tp, pp, cp and dp. The order of the two in :data:`_TRADES` says nothing."""
    facts = setup.facts
    sizes = {"tp": facts.tp, "pp": facts.pp, "cp": facts.cp, "dp": facts.dp}
    # context parallelism is tried where the search tries it
    long = setup.job.seq_length >= LONG_SEQUENCE or facts.world > facts.global_batch
    for one, other in _TRADES:
        both = sizes[one] * sizes[other]
        for size in divisors(both):
            changed = sizes | {one: size, other: both // size}
            if size == sizes[one] or changed["pp"] > facts.num_layers:
                continue
            if changed["tp"] > max(sizes["tp"], setup.cluster.fast_domain):
                continue  # tensor parallelism across the slow network
            if changed["cp"] > max(sizes["cp"], 1) and not long:
                continue
            yield regrouped(setup, f"{one}/{other}", changed["tp"], changed["pp"], changed["cp"])


def regrouped(setup: MegatronSetup, setting: str, tp: int, pp: int, cp: int) -> Option:
    """The option of other degrees; the split of the layers and sequence parallelism follow them."""
    facts = setup.facts
    values: dict[str, str | bool | None] = {}
    for axis, size, today in (("tp", tp, facts.tp), ("pp", pp, facts.pp), ("cp", cp, facts.cp)):
        if size != today:
            values |= _degree(setup, axis, size)
    if pp != facts.pp:
        values |= resplit(setup, pp)
    if tp > 1 and facts.tp == 1:
        values["sequence-parallel"] = True
    if tp != facts.tp and "expert-tensor-parallel-size" not in setup.recipe.arguments and facts.etp > 1:
        values["expert-tensor-parallel-size"] = str(facts.etp)  # its default follows tp
    return setup.changed(setting, values)


def resplit(setup: MegatronSetup, pp: int) -> Values:
    """Arguments for an even split over other stages, or nearly even; virtual stages stay if they can."""
    facts = setup.facts
    values = _without((*_SPLIT, _CHUNKS, _CHUNK_SIZE, _GROUP))
    share, over = divmod(facts.num_layers, pp)
    if over:  # the outer stages also have the embedding and the head, so they get the smaller share
        inner = [*range(1, pp - 1), 0, pp - 1]
        counts = [share + (stage in inner[:over]) for stage in range(pp)]
        return values | _layout(counts, setup.model.mtp_layers)
    virtual = virtual_of(facts) or 1
    if virtual > 1 and pp > 1 and share % virtual == 0:
        by_size = bool(facts.optional(_CHUNK_SIZE))
        values |= {_CHUNK_SIZE: str(share // virtual)} if by_size else {_CHUNKS: str(virtual)}
        if _GROUP in facts.arguments:
            values[_GROUP] = str(max(pp, facts.count(_GROUP)))
    return values


def _layout(counts: Sequence[int], mtp_layers: int) -> dict[str, str | bool | None]:
    split = pipeline_arguments(counts, mtp_layers)
    return {name.removeprefix("--"): str(value) for name, value in split.items() if name.endswith(("layers", "layout"))}


def micro_batches(setup: MegatronSetup) -> Iterator[Option]:
    """Other micro-batches; their number follows."""
    facts = setup.facts
    samples, rest = divmod(facts.global_batch, facts.dp)
    for size in divisors(samples) if samples and not rest else []:
        if size != facts.micro_batch:
            yield setup.changed("micro-batch", {"micro-batch-size": str(size)})


def recomputation(setup: MegatronSetup) -> Iterator[Option]:
    """Nothing, attention alone, the first N layers of each chunk, or all."""
    facts, fused = setup.facts, setup.job.flash_attention
    plain = _without(_RECOMPUTE)
    if facts.recompute:
        yield setup.changed("recompute", plain)
    if facts.recompute != "selective" and not fused:
        yield setup.changed("recompute", plain | {"recompute-granularity": "selective"})
    full = plain | {"recompute-granularity": "full"}
    yield setup.changed("recompute", full | {"recompute-method": "uniform", "recompute-num-layers": "1"})
    for count in range(1, max(chunks_of(facts), default=1)):
        yield setup.changed("recompute", full | {"recompute-method": "block", "recompute-num-layers": str(count)})


def sharding(setup: MegatronSetup) -> Iterator[Option]:
    """Other ZeRO stages: 1 is the distributed optimizer, 2 and 3 are Megatron-FSDP."""
    facts = setup.facts
    if facts.dp * facts.cp == 1:
        return
    for stage in sorted(setup.recipe.expressible_zero - {facts.zero}):
        if stage < 2 or facts.pp == 1:
            yield setup.changed("zero", sharded(setup, stage))


def sharded(setup: MegatronSetup, stage: int) -> Values:
    """Arguments of a ZeRO stage, overlapped if gradients are."""
    facts = setup.facts
    values = _without(_FSDP)
    if facts.text("ckpt-format") == "fsdp_dtensor":
        values["ckpt-format"] = None
    values["use-distributed-optimizer"] = True if stage else None
    gathers = stage and facts.on("overlap-grad-reduce") and not setup.overlaps_itself
    values["overlap-param-gather"] = True if gathers else None
    if stage > 1:
        values |= {"use-megatron-fsdp": True, "data-parallel-sharding-strategy": SHARDING_OF_ZERO[stage]}
        values |= {"ckpt-format": "fsdp_dtensor", "no-gradient-accumulation-fusion": True}
    if stage == 3:
        values["init-model-with-meta-device"] = True
    return values


def overlaps(setup: MegatronSetup) -> Iterator[Option]:
    """Data-parallel communication behind the backward and the forward pass."""
    facts = setup.facts
    if facts.dp * facts.cp == 1 or setup.overlaps_itself or facts.zero > 1:
        return
    values: dict[str, str | bool | None] = {"overlap-grad-reduce": True}
    if facts.zero:
        values["overlap-param-gather"] = True
    if not all(facts.on(name) for name in values):
        yield setup.changed("overlap", values)


def sequence_parallel(setup: MegatronSetup) -> Iterator[Option]:
    """Sequence parallelism, where tensor parallelism has none."""
    if setup.facts.tp > 1 and not setup.facts.sequence_parallel:
        yield setup.changed("sequence parallel", {"sequence-parallel": True})


def virtual_stages(setup: MegatronSetup) -> Iterator[Option]:
    """Other numbers of chunks a stage, where the split is even."""
    facts = setup.facts
    share, over = divmod(facts.num_layers, facts.pp)
    if facts.pp == 1 or over or any(name in facts.arguments for name in _SPLIT):
        return
    for chunks in divisors(share):
        if chunks != (virtual_of(facts) or 1) and chunks <= _MOST_CHUNKS:
            values = _without((_CHUNK_SIZE, _CHUNKS))
            yield setup.changed("vpp", values | ({_CHUNKS: str(chunks)} if chunks > 1 else {}))


def balanced(setup: MegatronSetup) -> Iterator[Option]:
    """Layers moved off the first and the last stage, which also have the embedding and the head."""
    facts = setup.facts
    pp, layers = facts.pp, facts.num_layers
    if pp == 1 or (virtual_of(facts) or 1) > 1:
        return
    for first in range(_MOST_LAYERS_MOVED + 1):
        for last in range(_MOST_LAYERS_MOVED + 1):
            counts = _lightened(layers, pp, first, last)
            if counts and counts != chunks_of(facts):
                yield setup.changed("layers", _without(_SPLIT) | _layout(counts, setup.model.mtp_layers))


def _lightened(layers: int, pp: int, first: int, last: int) -> tuple[int, ...]:
    """Layers of each stage with ``first`` and ``last`` fewer than an even share on the outer ones; empty: too few."""
    share = -(-layers // pp)
    if pp == 2:
        kept = share - first if first else layers - share + last
        return (kept, layers - kept) if not (first and last) and 0 < kept < layers else ()
    outer = (share - first, share - last)
    inner, over = divmod(layers - sum(outer), pp - 2)
    middle = [inner + (stage < over) for stage in range(pp - 2)]
    counts = [outer[0], *middle, outer[1]]
    return tuple(counts) if min(counts) > 0 else ()


def experts(setup: MegatronSetup) -> Iterator[Option]:
    """Other expert-parallel degrees, and no tensor parallelism inside experts."""
    facts, moe = setup.facts, setup.model.moe
    if moe is None:
        return
    devices = facts.world // facts.pp
    for ep in divisors(moe.num_experts):
        if ep != facts.ep and devices % (ep * facts.etp) == 0:
            yield setup.changed("ep", {_DEGREES["ep"]: str(ep)})
    if facts.etp > 1:
        yield setup.changed("etp", {_DEGREES["etp"]: "1"})
        if devices % (facts.ep * facts.etp) == 0 and moe.num_experts % (facts.ep * facts.etp) == 0:
            yield setup.changed("ep/etp", {_DEGREES["ep"]: str(facts.ep * facts.etp), _DEGREES["etp"]: "1"})
