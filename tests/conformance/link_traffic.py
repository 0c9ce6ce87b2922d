"""Counts what collectives and stages send, for scripts that train with a real engine; to be imported before it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import distributed_c10d

# How often a ring sends (n - 1) / n of the whole tensor over a rank's link.
_TIMES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}


class LinkTraffic:
    """Bytes that a rank sends since the last reset: over its link by the collectives of ``torch.distributed``, and to
    other ranks one by one."""

    def __init__(self) -> None:
        self.collective = self.single = 0.0
        for name, times in _TIMES.items():
            setattr(torch.distributed, name, self._counted(getattr(torch.distributed, name), times))
        # operations of a batch of sends are compared with the function in the module they come from
        send = torch.distributed.isend
        torch.distributed.isend = distributed_c10d.isend = self._counted_send(send)

    def reset(self) -> None:
        self.collective = self.single = 0.0

    def _counted(self, operation: Any, times: int) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            every = (*args, *kwargs.values())
            group = next((each for each in every if isinstance(each, torch.distributed.ProcessGroup)), None)
            ranks = torch.distributed.get_world_size(group)
            whole = max(each.numel() * each.element_size() for each in every if isinstance(each, torch.Tensor))
            self.collective += times * whole * (ranks - 1) / ranks
            return operation(*args, **kwargs)

        return count

    def _counted_send(self, send: Any) -> Any:
        running = False

        def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if not running:  # a mode that overrides torch functions calls it again
                self.single += tensor.numel() * tensor.element_size()
            outer, running = running, True
            try:
                return send(tensor, *args, **kwargs)
            finally:
                running = outer

        return count
