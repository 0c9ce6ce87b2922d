"""Pareto filtering of label sets: the inner loop of the exact dynamic programs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uniap_tune.problem import FloatArray, IntArray

# Above this many rows a quadratic comparison is done in blocks against the rows kept so far.
_BLOCK = 384


def pareto(criteria: FloatArray, group: IntArray) -> NDArray[np.intp]:
    """Indices of the rows no other row of the same group dominates, sorted by (group, criteria).

    A row dominates another if it is <= in every criterion; of equal rows the first is kept. Exact: no tolerance.

    Args:
        criteria: [M, C], smaller is better.
        group: [M]; rows of different groups are never compared.
    """
    if len(group) <= 1:
        return np.arange(len(group))
    order = np.lexsort((*criteria.T[::-1], group))
    rows, groups = criteria[order], group[order]
    if len(order) <= _BLOCK:
        return order[_survivors(rows, groups)]
    borders = np.flatnonzero(np.diff(groups)) + 1
    kept = [part[_group_front(criteria[part])] if len(part) > 1 else part for part in np.split(order, borders)]
    return np.concatenate(kept)


def _survivors(rows: FloatArray, groups: IntArray) -> NDArray[np.bool_]:
    """Survivors among lexicographically sorted rows: only an earlier row can dominate a later one."""
    dominates = groups[:, None] == groups[None, :]
    for column in rows.T:
        dominates &= column[:, None] <= column[None, :]
    survivors: NDArray[np.bool_] = ~np.triu(dominates, 1).any(axis=0)
    return survivors


def _group_front(rows: FloatArray) -> NDArray[np.bool_]:
    """As :func:`_survivors` for one group of any size, in blocks."""
    size = len(rows)
    alive = np.ones(size, dtype=np.bool_)
    kept = np.empty((0, rows.shape[1]))
    one_group = np.zeros(_BLOCK, dtype=np.int64)
    for start in range(0, size, _BLOCK):
        block = rows[start : start + _BLOCK]
        mask = ~_dominated(block, kept)
        survivors = np.flatnonzero(mask)
        mask[survivors] = _survivors(block[survivors], one_group[: len(survivors)])
        alive[start : start + len(block)] = mask
        kept = np.concatenate([kept, block[mask]])
    return alive


def _dominated(rows: FloatArray, front: FloatArray) -> NDArray[np.bool_]:
    """Which rows some row of ``front`` dominates."""
    result = np.zeros(len(rows), dtype=np.bool_)
    for start in range(0, len(front), _BLOCK):
        part = front[start : start + _BLOCK]
        below = np.ones((len(part), len(rows)), dtype=np.bool_)
        for f, r in zip(part.T, rows.T, strict=True):
            below &= f[:, None] <= r[None, :]
        result |= below.any(axis=0)
    return result
