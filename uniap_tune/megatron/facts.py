"""Arguments of Megatron-LM as values: what the rules and the reading of recipes look at.

Names are without dashes. What a flag means follows megatron/training/arguments.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from uniap_tune.megatron.layout import Layout, accounted, even, first_and_last, parse_layout

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

# Values of --data-parallel-sharding-strategy, and the ZeRO stages they are.
ZERO_OF_SHARDING: Mapping[str, int] = MappingProxyType(
    {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
)
SHARDING_OF_ZERO: Mapping[int, str] = MappingProxyType({zero: name for name, zero in ZERO_OF_SHARDING.items()})
_HALVES = ("recompute-method", "recompute-num-layers")


@dataclass(frozen=True, slots=True)
class MegatronFacts:
    """A configuration.

    Attributes:
        arguments: values by name, ``True`` for a switch.
        world: devices.
        environment: variables that are set.
        single_queue: the devices need one work queue for tensor parallelism (those before Blackwell).
    """

    arguments: Mapping[str, str | bool]
    world: int
    environment: Mapping[str, str] = field(default_factory=dict)
    single_queue: bool = True

    def count(self, name: str, default: int = 1) -> int:
        """A whole number."""
        value = self.arguments.get(name)
        return default if value is None or value is True else int(value)

    def optional(self, name: str) -> int | None:
        """A whole number, ``None`` if it is not given."""
        return self.count(name) if name in self.arguments else None

    def text(self, name: str) -> str:
        """A value as text, empty if it is not given."""
        value = self.arguments.get(name, "")
        return value if isinstance(value, str) else ""

    def on(self, name: str) -> bool:
        """Whether a switch is given."""
        return bool(self.arguments.get(name, False))

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self.count("tensor-model-parallel-size")

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.count("pipeline-model-parallel-size")

    @property
    def cp(self) -> int:
        """Context-parallel degree."""
        return self.count("context-parallel-size")

    @property
    def ep(self) -> int:
        """Expert-parallel degree."""
        return self.count("expert-model-parallel-size")

    @property
    def etp(self) -> int:
        """Tensor-parallel degree of the experts, by default that of attention; 1 without experts."""
        return self.count("expert-tensor-parallel-size", self.tp) if "num-experts" in self.arguments else 1

    @property
    def dp(self) -> int:
        """Data-parallel degree, rounded down."""
        return max(1, self.world // (self.tp * self.pp * self.cp))

    @property
    def zero(self) -> int:
        """ZeRO stage: the distributed optimizer is 1, Megatron-FSDP what its strategy says (by default 3)."""
        if self.on("use-megatron-fsdp") or self.on("use-custom-fsdp"):
            return ZERO_OF_SHARDING.get(self.text("data-parallel-sharding-strategy"), 3)
        if self.on("use-torch-fsdp2"):
            return 3
        return 1 if self.on("use-distributed-optimizer") else 0

    @property
    def sequence_parallel(self) -> bool:
        """Megatron switches it off itself without tensor parallelism (arg:1433)."""
        return self.tp > 1 and self.on("sequence-parallel")

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return self.count("num-layers")

    @property
    def micro_batch(self) -> int:
        """Samples of a micro-batch on one replica."""
        return self.count("micro-batch-size")

    @property
    def global_batch(self) -> int:
        """Samples of a step, by default one micro-batch a replica."""
        return self.count("global-batch-size", self.micro_batch * self.dp)

    @property
    def microbatches(self) -> int:
        """Micro-batches of a step, rounded down."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def recompute(self) -> str:
        """``full``, ``selective`` or nothing."""
        if self.on("recompute-activations"):
            return "selective"
        return self.text("recompute-granularity")

    @property
    def recompute_details(self) -> tuple[str, ...]:
        """Which of the method and the number of layers are given."""
        return tuple(name for name in _HALVES if name in self.arguments)

    @property
    def layout(self) -> Layout | None:
        """The layout string's stages; raises :class:`ValueError` if it is not of the grammar."""
        text = self.text("pipeline-model-parallel-layout")
        return parse_layout(text) if text else None

    @property
    def virtual(self) -> int:
        """Model chunks of a stage; raises :class:`ValueError` like :attr:`layout`."""
        layout = self.layout
        if layout is not None:
            return max(1, len(layout.stages) // self.pp)
        if self.pp == 1:
            return 1
        size = self.optional("num-layers-per-virtual-pipeline-stage")
        if size:
            return max(1, self.num_layers // self.pp // size)
        return self.count("num-virtual-stages-per-pipeline-rank")

    @property
    def chunks(self) -> tuple[int, ...]:
        """Layers of each chunk; chunk k is on stage k % pp. Raises :class:`ValueError` for what does not divide."""
        layout = self.layout
        if layout is not None:
            return layout.blocks
        if self.pp == 1:
            return (self.num_layers,)
        first = self.optional("decoder-first-pipeline-num-layers")
        last = self.optional("decoder-last-pipeline-num-layers")
        parts = self.pp * self.virtual
        if first is not None or last is not None:
            stages = first_and_last(self.num_layers, self.pp, first, last)
            return tuple(even(stages[k % self.pp], self.virtual)[0] for k in range(parts))
        embedding, loss = (self.on(f"account-for-{part}-in-pipeline-split") for part in ("embedding", "loss"))
        if embedding or loss:
            return accounted(self.num_layers, parts, embedding=embedding, loss=loss)
        return even(self.num_layers, parts)
