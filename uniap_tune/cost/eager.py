"""What the modules of ``transformers`` move and keep: operators of PyTorch, where Megatron's layers are fused kernels.

Counted on the real modules in bf16, with PyTorch's dispatcher and its hooks for saved tensors
(tests/conformance/test_transformers_memory.py).
"""

from __future__ import annotations

from uniap_tune.spec import Model, Norm

# Elements that RMSNorm moves for each of its input, an activation function for each of its output, and rotary
# embeddings for each of queries and keys: forward and backward.
NORM = (18.0, 48.0)
GATED = (5.0, 9.0)
GELU_NEW = (18.0, 28.0)
ROTARY = (10.0, 14.0)

# Activation functions of plain MLPs, by what they keep besides their output; the others keep their input.
_BESIDES_OUTPUT = {"relu": 0, "gelu_new": 4}
# Families that project queries, keys and values in one: what was turned stays, because the values are a view of it.
_PROJECTED_IN_ONE = frozenset({"gpt_neox", "phi3"})
# Families whose rotary embeddings join a turned and a plain part, after which the context is copied back into order.
# (GPT-NeoX does so too, but its two norms share an input, which is as wide.)
_CONTEXT_COPIED = frozenset({"nemotron", "phi3"})
_HEADS_REPEATED = frozenset({"falcon"})  # keys and values written out for every head


def has_rms_norm(model: Model) -> bool:
    """Whether its norms are RMSNorm, which PyTorch's operators compute in fp32; LayerNorm is one operator."""
    return model.norm in (Norm.RMSNORM, Norm.RMSNORM_1P)


def norm_input(model: Model, width: float) -> float:
    """What a norm keeps in place of its input, in multiples of it: RMSNorm keeps it in fp32, and normalized, for
    Gemma's weights in fp32 too."""
    if not has_rms_norm(model):
        return 1.0
    return (4 + (4 if model.norm is Norm.RMSNORM_1P else width)) / width


def mlp_tensors(model: Model) -> int:
    """Tensors as wide as the MLP that it keeps besides what its down projection reads."""
    return 3 if model.gated_mlp else _BESIDES_OUTPUT.get(model.activation, 1)


def activation(model: Model) -> tuple[float, float] | None:
    """Elements that its activation function moves for each of its output; ``None``: one operator, as if fused."""
    if model.gated_mlp:
        return GATED
    return GELU_NEW if model.activation == "gelu_new" else None


def gradients(model: Model) -> int:
    """Elements a token that backward moves besides: gradients of biases are sums of their own, and those of what
    several projections read (queries, keys and values; gate and up) are added up."""
    found = model.q_width + 2 * model.kv_width if model.qkv_bias else 0
    found += model.hidden_size if model.attention_out_bias else 0
    found += model.hidden_size + model.ffn_size if model.mlp_bias else 0
    return found + 3 * model.hidden_size * (3 if model.gated_mlp else 2)


def besides_heads(model: Model) -> int:
    """Elements a token that attention keeps besides queries, keys, values and context."""
    found = model.q_width + model.kv_width if model.family in _PROJECTED_IN_ONE else 0
    found += model.q_width if model.family in _CONTEXT_COPIED else 0
    return found + (2 * (model.q_width - model.kv_width) if model.family in _HEADS_REPEATED else 0)
