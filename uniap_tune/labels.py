"""The trie of layer-type sequences and the labels at its nodes, which :mod:`uniap_tune.columns` grows."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from uniap_tune.problem import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, eq=False, slots=True)
class Labels:
    """N labels at one node of the trie; ``parent`` indexes the labels of the node above, ``k`` the last strategy."""

    t: FloatArray
    m: FloatArray
    w: FloatArray
    s: FloatArray
    g: FloatArray
    entry: IntArray
    layout: IntArray
    parent: IntArray
    k: IntArray

    def __len__(self) -> int:
        return len(self.t)

    def take(self, index: IntArray | BoolArray) -> Labels:
        """The labels at these places."""
        return Labels(*(getattr(self, name)[index] for name in self.__slots__))


@dataclass(eq=False, slots=True)
class Node:
    """A sequence of layer types, by its last one. ``caps`` [G, W, Z] bound t + omega g + lambda m of useful labels
    that end in each layout."""

    layer: int
    first: int
    up: Node | None
    caps: FloatArray | None = None
    spare: float = -math.inf  # most bytes a label may hold so that the leanest completion fits
    floor: float = math.inf  # every completion has a transient of at least this many bytes
    down: dict[Hashable, Node] = field(default_factory=dict)
    labels: Labels | None = None

    def strategies(self, index: int) -> list[int]:
        """The strategies of a label, first layer first."""
        result: list[int] = []
        node: Node | None = self
        while node is not None:
            assert node.labels is not None
            result.append(int(node.labels.k[index]))
            index = int(node.labels.parent[index])
            node = node.up
        return result[::-1]
