"""Which layers each stage of a record holds, when all layers have one strategy."""

from __future__ import annotations

from uniap_tune.errors import InputError
from uniap_tune.graph import LayerKind, LayerType, build_graph
from uniap_tune.megatron.layout import parse_layout
from uniap_tune.predict import Layers, grouped, uniform_chunks
from uniap_tune.spec import Model
from uniap_tune.strategy import Strategy

Chunks = tuple[tuple[Layers, ...], ...]


def laid_out(layout: str, model: Model, strategy: Strategy, pp: int, virtual_stages: int | None) -> Chunks:
    """The chunks of a pipeline: those of the layout, or without one an even division.

    Where multi-token prediction makes the head heavy and layers do not divide, every chunk takes the same number and
    the last what is left, as in NVIDIA's layouts of DeepSeek-V3 (megatron/bridge/recipes/deepseek).

    Args:
        layout: Megatron's ``--pipeline-model-parallel-layout``, or empty.
        model: what is trained.
        strategy: that of all layers.
        pp: pipeline stages.
        virtual_stages: chunks of a stage; ``None``: those of the layout.

    Raises:
        InputError: the layout does not describe this model on these stages.
    """
    types = [layer.type for layer in build_graph(model).layers]
    if layout:
        return _cut(types, _described(layout, model, pp, virtual_stages), strategy)
    parts = pp * (virtual_stages or 1)
    size = -(-model.num_layers // parts)
    if model.mtp_layers and model.num_layers % parts and size * (parts - 1) <= model.num_layers:
        sizes = [size] * (parts - 1)
        return _cut(types, [*sizes, model.num_layers - sum(sizes)], strategy)
    return uniform_chunks(types, strategy, pp, virtual_stages or 1)


def _described(layout: str, model: Model, pp: int, virtual_stages: int | None) -> list[int]:
    try:
        parsed = parse_layout(layout)
    except ValueError as error:
        raise InputError(f"record's pp_layout: {error}", fix="correct pp_layout") from None
    faults = parsed.faults(model.num_layers, pp)
    if not faults and virtual_stages and len(parsed.stages) != pp * virtual_stages:
        faults = f"it has {len(parsed.stages)} stages, the record {pp} times {virtual_stages}"
    if faults:
        raise InputError(f"record's pp_layout does not fit: {faults}", fix="correct pp_layout")
    return list(parsed.blocks)


def _cut(types: list[LayerType], sizes: list[int], strategy: Strategy) -> Chunks:
    """Blocks by the number of each chunk, the embedding before the first and the head after the last."""
    blocks = [layer for layer in types if layer.kind is LayerKind.BLOCK]
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    parts = [blocks[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    parts[0].insert(0, types[0])
    parts[-1].append(types[-1])
    return tuple(grouped(part, strategy) for part in parts)
