"""What you train (:class:`Model`), what you have (:class:`Cluster`), how you train it (:class:`Job`).

Frozen values with no behaviour beyond derived properties and the checks that make a value meaningful. Adapters
produce them, everything else consumes them. Sizes are element counts unless a name says ``bytes``; seconds,
bytes, FLOP/s and bytes/s are plain floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from uniap_tune.errors import InputError


class Norm(StrEnum):
    """Normalization layer."""

    LAYERNORM = "layernorm"
    LAYERNORM_1P = "layernorm_1p"  # weight stored as w - 1 (Nemotron)
    RMSNORM = "rmsnorm"
    RMSNORM_1P = "rmsnorm_1p"  # weight stored as w - 1 (Gemma)


class Position(StrEnum):
    """How positions enter the model."""

    ROPE = "rope"
    LEARNED = "learned"
    ALIBI = "alibi"
    NONE = "none"


class QkNorm(StrEnum):
    """Normalization of queries and keys before attention."""

    NONE = "none"
    PER_HEAD = "per_head"  # one weight of head_dim shared by the heads (Qwen3, Gemma 3)
    L2 = "l2"  # without weights (Llama 4)
    FULL = "full"  # a weight as wide as the projection (OLMo 2)


class DType(StrEnum):
    """Number formats of matrix multiplications."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"


class OptimizerName(StrEnum):
    """Optimizers whose states the cost model knows."""

    ADAM = "adam"
    SGD = "sgd"


class Recompute(StrEnum):
    """Activation recomputation of one layer (arXiv 2205.05198 section 5)."""

    NONE = "none"
    SELECTIVE = "selective"  # the attention core only
    FULL = "full"  # everything but the layer's input


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """Mixture-of-experts feed-forward layers.

    ``first_dense_layers`` leading layers, and every layer whose index is not ``layer_offset`` modulo
    ``layer_frequency``, use the dense MLP of ``Model.ffn_size``. ``shared_ffn_size`` is the total width of the
    shared experts.
    """

    num_experts: int
    top_k: int
    expert_ffn_size: int
    shared_ffn_size: int = 0
    first_dense_layers: int = 0
    layer_frequency: int = 1
    layer_offset: int = 0
    router_bias: bool = False
    shared_expert_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A transformer: all facts needed to count parameters, FLOPs and activations.

    Decoder-only by default. ``causal=False`` is an encoder (BERT), with ``token_types`` rows of token-type embeddings,
    ``head_transform`` (a dense layer and a norm before the output projection) and ``pooled_head`` (a dense layer and a
    two-way classifier of the first token). ``encoder_layers`` blocks of an encoder before ``num_layers`` blocks of a
    decoder, each of which attends to the encoder's output too, make an encoder-decoder (T5); ``relative_buckets`` rows
    of relative-position biases for either.

    ``position_rows`` is the number of rows of a learned position table (0 without one), ``max_positions`` the
    longest sequence the model accepts (``None``: no limit). ``embedding_size`` differs from ``hidden_size`` only
    for models that project their embeddings (OPT-350M). ``norms_per_layer`` counts full-width norms of a block.
    ``window`` is the sliding-window width of local layers; every ``window_global_every``-th layer is global
    (0: all layers local).
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm: Norm = Norm.RMSNORM
    norm_bias: bool = False
    norms_per_layer: int = 2
    final_norm: bool = True
    embedding_norm: bool = False
    qk_norm: QkNorm = QkNorm.NONE
    norm_epsilon: float = 1e-5
    position: Position = Position.ROPE
    max_positions: int | None = None
    position_rows: int = 0
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: str | None = None
    rope_scaling_factor: float | None = None
    gated_mlp: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied_embeddings: bool = False
    embedding_size: int | None = None
    parallel_residual: bool = False
    window: int | None = None
    window_global_every: int = 0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    moe: Moe | None = None
    mla: Mla | None = None
    mtp_layers: int = 0
    causal: bool = True
    token_types: int = 0
    head_transform: bool = False
    pooled_head: bool = False
    encoder_layers: int = 0
    relative_buckets: int = 0

    def __post_init__(self) -> None:
        for key in ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            _require_positive(f"model {self.name}", key, getattr(self, key))
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model {self.name}: num_heads ({self.num_heads}) is not a multiple of "
                f"num_kv_heads ({self.num_kv_heads})",
                fix="correct num_attention_heads or num_key_value_heads",
            )

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads (or value heads) together."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An accelerator. ``peak_flops`` maps a :class:`DType` to dense FLOP/s without sparsity.

    ``generation`` names the set of efficiency constants it uses (``uniap_tune/data/efficiency``); ``watts`` is its
    power limit (``None``: not known, its clocks hold under load); ``host``: CPU time of a launch on the machines it is
    in, relative to those of H100.
    """

    name: str
    vendor: str
    generation: str
    memory_bytes: float
    memory_bandwidth: float
    peak_flops: Mapping[DType, float]
    num_sms: int
    watts: float | None = None
    host: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        _require_positive(f"device {self.name}", "host", self.host)
        _require_positive(f"device {self.name}", "memory_bytes", self.memory_bytes)
        _require_positive(f"device {self.name}", "memory_bandwidth", self.memory_bandwidth)
        object.__setattr__(self, "peak_flops", MappingProxyType(dict(self.peak_flops)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link in the alpha-beta model: a message of n bytes takes ``latency_s + n / bandwidth`` seconds.

    ``bandwidth`` is one direction, bytes/s, of one device's (or one rail's) port. ``mesh``: the port is no way to a
    switch but a bundle of equal links, one to each other device of the domain.
    """

    bandwidth: float
    latency_s: float
    mesh: bool = False

    def __post_init__(self) -> None:
        _require_positive("link", "bandwidth", self.bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Identical nodes of identical devices on a two-level network.

    ``intra`` is the link of one device inside its NVLink (or PCIe) domain of ``domain_size`` devices; ``inter``
    is one network rail of a node, of which there are ``rails_per_node``. ``memory_fraction`` is the part of a
    device's memory that a plan may use; ``None`` leaves the margin to the cost model.
    """

    name: str
    device: Device
    num_nodes: int
    devices_per_node: int
    intra: Link
    inter: Link
    rails_per_node: int = 1
    domain_size: int | None = None
    memory_fraction: float | None = None

    def __post_init__(self) -> None:
        _require_positive(f"cluster {self.name}", "num_nodes", self.num_nodes)
        _require_positive(f"cluster {self.name}", "devices_per_node", self.devices_per_node)
        _require_positive(f"cluster {self.name}", "rails_per_node", self.rails_per_node)

    @property
    def num_devices(self) -> int:
        """Devices in the cluster."""
        return self.num_nodes * self.devices_per_node

    @property
    def fast_domain(self) -> int:
        """Devices reachable over the intra link: the NVLink domain, by default a node."""
        return self.domain_size or self.devices_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Number formats of training. ``gradient_bytes=None`` is the engine's own choice.

    Mixed precision (fp16, bf16, fp8, …) keeps fp32 master weights unless ``master_weights`` is False.
    """

    compute: DType = DType.BF16
    master_weights: bool = True
    gradient_bytes: int | None = None

    @property
    def param_bytes(self) -> int:
        """Bytes of a parameter as the forward pass reads it (FP8 and FP4 recipes keep BF16 parameters)."""
        return 4 if self.compute is DType.FP32 else 2

    @property
    def master_bytes(self) -> int:
        """Bytes of a parameter's fp32 master copy (0 when the parameter itself is fp32)."""
        return 0 if self.compute is DType.FP32 or not self.master_weights else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How the model is trained. Nothing here is changed by planning.

    ``encoder_seq_length`` is the sequence of an encoder-decoder's encoder, by default ``seq_length``;
    ``allowed_recompute`` is what the planner may choose from.
    """

    global_batch: int
    seq_length: int
    precision: Precision = field(default_factory=Precision)
    optimizer: OptimizerName = OptimizerName.ADAM
    optimizer_state_bytes: int | None = None
    flash_attention: bool = True
    allowed_recompute: frozenset[Recompute] = frozenset(Recompute)
    encoder_seq_length: int | None = None

    def __post_init__(self) -> None:
        _require_positive("job", "global_batch", self.global_batch)
        _require_positive("job", "seq_length", self.seq_length)

    def sequence(self, *, encoder: bool) -> int:
        """Tokens of a sample in the encoder, or in the decoder."""
        return self.encoder_seq_length or self.seq_length if encoder else self.seq_length

    @property
    def state_bytes(self) -> int:
        """Optimizer state bytes per parameter, without master weights (Adam: two fp32 moments)."""
        if self.optimizer_state_bytes is not None:
            return self.optimizer_state_bytes
        return 8 if self.optimizer is OptimizerName.ADAM else 4


def _require_positive(owner: str, key: str, value: float) -> None:
    if not value > 0 or value != value or value == float("inf"):
        raise InputError(f"{owner}: {key} must be positive, not {value}", fix=f"give {key} a value above zero")
