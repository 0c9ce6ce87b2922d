"""Counts what collectives send, for scripts that train with a real engine; to be imported before the engine."""

from __future__ import annotations

from typing import Any

import torch

# How often a ring sends (n - 1) / n of the whole tensor over a rank's link.
_TIMES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}


class LinkTraffic:
    """Bytes over a rank's link by the collectives of ``torch.distributed`` since the last reset."""

    def __init__(self) -> None:
        self.bytes = 0.0
        for name, times in _TIMES.items():
            setattr(torch.distributed, name, self._counted(getattr(torch.distributed, name), times))

    def reset(self) -> None:
        self.bytes = 0.0

    def _counted(self, operation: Any, times: int) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            every = (*args, *kwargs.values())
            group = next((each for each in every if isinstance(each, torch.distributed.ProcessGroup)), None)
            ranks = torch.distributed.get_world_size(group)
            whole = max(each.numel() * each.element_size() for each in every if isinstance(each, torch.Tensor))
            self.bytes += times * whole * (ranks - 1) / ranks
            return operation(*args, **kwargs)

        return count
