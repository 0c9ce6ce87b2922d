"""Bytes that PyTorch's caching allocator counts beyond those asked for.

A free block is cut for a smaller tensor only where enough of it remains: 512 bytes in segments for small tensors, more
than 1 MiB in those for large ones. What remains uncut counts as allocated. Tensors of a few MiB that do not divide
20 MiB, such as the weights of hidden size 768, lose several percent to it; flat buffers, as of the distributed
optimizer, nothing. (pytorch, c10/cuda/CUDACachingAllocator.cpp: best fit, kSmallSize, kLargeBuffer, should_split.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

_MIB = 2**20
_ROUND = 512  # kMinBlockSize
_SMALL = _MIB  # kSmallSize
_SMALL_SEGMENT = 2 * _MIB  # kSmallBuffer
_SEGMENT = 20 * _MIB  # kLargeBuffer, for tensors below kMinLargeAlloc
_OWN_SEGMENT = 10 * _MIB  # kMinLargeAlloc
_SEGMENT_ROUND = 2 * _MIB  # kRoundLarge

_Block = tuple[int, int, int]  # size, segment, offset
Allocation = tuple[int, bool]  # bytes of a tensor, and whether backward needs it


class CachingAllocator:
    """One stream's allocations, as the allocator places and counts them."""

    def __init__(self) -> None:
        self._free: dict[bool, list[_Block]] = {True: [], False: []}  # small or not; ascending
        self._segments = 0
        self.allocated = 0

    def allocate(self, size: int) -> _Block:
        """The block that a tensor of ``size`` bytes gets: the smallest free one that is large enough."""
        size = max(_ROUND, -(-size // _ROUND) * _ROUND)
        small = size <= _SMALL
        free = self._free[small]
        at = bisect_left(free, (size, -1, -1))
        length, segment, offset = free.pop(at) if at < len(free) else self._new_segment(size)
        left = length - size
        if left >= _ROUND if small else left > _SMALL:
            insort(free, (left, segment, offset + size))
            length = size
        self.allocated += length
        return length, segment, offset

    def release(self, block: _Block) -> None:
        """Gives a block back; free neighbours in its segment become one."""
        size, segment, offset = block
        self.allocated -= size
        for free in self._free.values():
            near = [one for one in free if one[1] == segment and (one[2] + one[0] == offset or offset + size == one[2])]
            for one in near:
                free.remove(one)
                size, offset = size + one[0], min(offset, one[2])
        insort(self._free[block[0] <= _SMALL], (size, segment, offset))

    def _new_segment(self, size: int) -> _Block:
        self._segments += 1
        if size <= _SMALL:
            return _SMALL_SEGMENT, self._segments, 0
        if size < _OWN_SEGMENT:
            return _SEGMENT, self._segments, 0
        return -(-size // _SEGMENT_ROUND) * _SEGMENT_ROUND, self._segments, 0


@lru_cache(maxsize=1024)
def uncut_states(tensors: Sequence[int], parameter_bytes: int, gradient_bytes: int) -> int:
    """What is counted beyond the bytes of a rank's states where each parameter has tensors of its own.

    Args:
        tensors: elements of each parameter, in the order in which the model makes them.
        parameter_bytes: bytes an element of a parameter; its gradients are one buffer of ``gradient_bytes`` each.

    The optimizer copies every parameter, widens the copy to fp32 and lets the copy go, and makes its two moments at the
    first step (megatron/core/optimizer/optimizer.py, Float16OptimizerWithFloat16Params; FusedAdam).
    """
    allocator = CachingAllocator()
    for size in tensors:
        allocator.allocate(parameter_bytes * size)
    allocator.allocate(gradient_bytes * sum(tensors))
    for size in tensors:
        copy = allocator.allocate(parameter_bytes * size)
        allocator.allocate(4 * size)
        allocator.release(copy)
    for size in tensors:
        allocator.allocate(4 * size)
        allocator.allocate(4 * size)
    return allocator.allocated - (parameter_bytes + gradient_bytes + 12) * sum(tensors)


@lru_cache(maxsize=4096)
def uncut_activations(forward: tuple[Allocation, ...], times: int) -> int:
    """What is counted beyond the bytes that so many equal layers keep, one after the other, for their backward pass."""
    allocator = CachingAllocator()
    waiting: deque[_Block] = deque()  # what a layer lets go lives until the next such tensor is made
    kept = 0
    for size, is_kept in forward * times:
        block = allocator.allocate(size)
        if is_kept:
            kept += size
        else:
            waiting.append(block)
            if len(waiting) > 1:
                allocator.release(waiting.popleft())
    for block in waiting:
        allocator.release(block)
    return allocator.allocated - kept
