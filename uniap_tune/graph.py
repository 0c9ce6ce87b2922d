"""Model -> layer graph: the vertices V and edges E of the formulation.

Vertices are what an engine can put on a pipeline stage: the embedding, each transformer block (attention and
MLP together; those of an encoder before those of its decoder), and the head. The head holds the final norm, the
output projection and the loss, which engines never separate. Equal layers share one :class:`LayerType`, which is
what the cost model prices and what the solver aggregates on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from uniap_tune.spec import Model


class LayerKind(StrEnum):
    """What a vertex of the graph is."""

    EMBEDDING = "embedding"
    BLOCK = "block"
    HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerType:
    """All that distinguishes layers of one model: ``moe`` (experts instead of the dense MLP), ``window``
    (sliding-window width, ``None``: attends to everything), ``causal`` (only to what came before), ``encoder`` (of an
    encoder-decoder, with its own sequence length), ``cross`` (attends to the encoder's output too)."""

    kind: LayerKind
    moe: bool = False
    window: int | None = None
    causal: bool = True
    encoder: bool = False
    cross: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A vertex: its name as people see it and its type."""

    name: str
    type: LayerType


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Layers in topological order and directed edges between their indices."""

    layers: tuple[Layer, ...]
    edges: tuple[tuple[int, int], ...]

    @property
    def is_chain(self) -> bool:
        """Whether the edges are exactly u -> u + 1."""
        return sorted(set(self.edges)) == [(u, u + 1) for u in range(len(self.layers) - 1)]


def build_graph(model: Model) -> Graph:
    """The layer graph of a model: embedding, ``num_layers`` blocks, head: a chain.

    An encoder-decoder has its encoder's blocks first; the last of them feeds every block of the decoder, whose first
    reads the embedding.
    """
    encoder = [Layer(name=f"encoder.{i}", type=_ENCODER_BLOCK) for i in range(model.encoder_layers)]
    blocks = [Layer(name=f"layers.{i}", type=block_type(model, i)) for i in range(model.num_layers)]
    layers = (
        Layer(name="embedding", type=LayerType(kind=LayerKind.EMBEDDING)),
        *encoder,
        *blocks,
        Layer(name="head", type=LayerType(kind=LayerKind.HEAD)),
    )
    edges = [(u, u + 1) for u in range(len(layers) - 1)]
    if encoder:
        last = len(encoder)
        edges.append((0, last + 1))
        edges += [(last, last + 1 + place) for place in range(1, model.num_layers)]
    return Graph(layers=layers, edges=tuple(sorted(edges)))


_ENCODER_BLOCK = LayerType(kind=LayerKind.BLOCK, causal=False, encoder=True)


def block_type(model: Model, index: int) -> LayerType:
    """The type of transformer block ``index`` (from 0; of the decoder where there is an encoder)."""
    return LayerType(
        kind=LayerKind.BLOCK,
        moe=_is_moe(model, index),
        window=_window(model, index),
        causal=model.causal,
        cross=model.encoder_layers > 0,
    )


def _is_moe(model: Model, index: int) -> bool:
    moe = model.moe
    if moe is None or index < moe.first_dense_layers:
        return False
    return index % moe.layer_frequency == moe.layer_offset


def _window(model: Model, index: int) -> int | None:
    every = model.window_global_every
    if model.window is None or (every and (index + 1) % every == 0):
        return None
    return model.window
