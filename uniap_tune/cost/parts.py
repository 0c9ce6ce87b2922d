"""The answer of the cost model for one layer under one strategy: named parts, never only a sum.

Names are those of the breakdowns people see (``explain``, ``plan.json``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# time parts, seconds
COMPUTE = "compute"
RECOMPUTE = "recompute"
TP_COMM = "tp_comm"
CP_COMM = "cp_comm"
EP_COMM = "ep_comm"
ZERO_COMM = "zero_comm"  # parameter gathers and gradient scatters of every micro-batch (ZeRO-3)
DP_COMM = "dp_comm"  # exposed gradient reduction and parameter gather, once a step
OPTIMIZER = "optimizer"

# memory parts, bytes
PARAMETERS = "parameters"
GRADIENTS = "gradients"
OPTIMIZER_STATES = "optimizer_states"
ACTIVATIONS = "activations"
BUFFERS = "buffers"  # communication buckets, workspaces
WORKSPACE = "workspace"  # lives only while the layer runs: recomputed activations, logits, gathered parameters

Parts = Mapping[str, float]


def _frozen(parts: Parts) -> Parts:
    return MappingProxyType({name: value for name, value in parts.items() if value})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """Seconds and bytes of one layer under one strategy on one device.

    Attributes:
        forward_s: seconds of one micro-batch forward, by part.
        backward_s: seconds of one micro-batch backward, recomputation included, by part.
        step_s: seconds once an optimizer step, only what is exposed, by part.
        static_bytes: bytes held for the whole step, by part.
        microbatch_bytes: bytes held for every micro-batch in flight, by part.
        transient_bytes: bytes needed only while the layer itself runs; a stage needs room for the largest of
            its layers' transients, not for their sum.
        step_bytes: bytes needed only while the optimizer runs, when no activation is alive (fp32 copies of narrow
            gradients): a stage needs the larger of their sum and what micro-batches take.
    """

    forward_s: Parts
    backward_s: Parts
    step_s: Parts = field(default_factory=dict)
    static_bytes: Parts = field(default_factory=dict)
    microbatch_bytes: Parts = field(default_factory=dict)
    transient_bytes: float = 0.0
    step_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward_s", "backward_s", "step_s", "static_bytes", "microbatch_bytes"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    @property
    def forward(self) -> float:
        """Seconds of one micro-batch forward."""
        return sum(self.forward_s.values())

    @property
    def backward(self) -> float:
        """Seconds of one micro-batch backward, recomputation included."""
        return sum(self.backward_s.values())

    @property
    def time(self) -> float:
        """Seconds of one micro-batch, forward and backward: A[u,k] of the formulation."""
        return self.forward + self.backward

    @property
    def step(self) -> float:
        """Seconds once a step: g[u,k] of the formulation."""
        return sum(self.step_s.values())

    @property
    def static(self) -> float:
        """Bytes held for the whole step."""
        return sum(self.static_bytes.values())

    @property
    def microbatch(self) -> float:
        """Bytes held for every micro-batch in flight."""
        return sum(self.microbatch_bytes.values())
