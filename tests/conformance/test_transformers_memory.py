"""What the modules of ``transformers`` keep and move, against what we count for DeepSpeed, on the CPU.

Tensors saved for backward are seen by PyTorch's hooks, bytes by its dispatcher. A layer is the difference between
models of two and of three layers. Dropout is off: on the CPU its mask is as wide as its input, on a GPU a byte an
element.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import parse_config
from uniap_tune.cost import eager
from uniap_tune.cost.activations import ActivationModel
from uniap_tune.cost.compute import ComputeModel
from uniap_tune.cost.efficiency import efficiency_for
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.operators import Shape
from uniap_tune.cost.runtime import TRANSFORMERS, TRANSFORMERS_LOSS
from uniap_tune.graph import LayerKind, block_type, build_graph
from uniap_tune.spec import Job, Model, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.57")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
]

Config = dict[str, Any]
SEQ = 256
HIDDEN = 256
VOCAB = 512
GROUPED = {"hidden_size": HIDDEN, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 704}
FAMILIES: dict[str, Config] = {
    "llama": {"model_type": "llama", **GROUPED},
    "qwen2": {"model_type": "qwen2", **GROUPED},
    "queries and keys normalized": {"model_type": "qwen3", "head_dim": 32, **GROUPED},
    "weights in fp32": {"model_type": "gemma", "head_dim": 32, **GROUPED},
    "four norms a layer": {"model_type": "gemma3_text", "head_dim": 32, **GROUPED},
    "projections in one": {"model_type": "phi3", "pad_token_id": 0, **GROUPED},
    "parallel attention and MLP": {
        "model_type": "gpt_neox",
        "hidden_size": HIDDEN,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "heads repeated": {
        "model_type": "falcon",
        "hidden_size": HIDDEN,
        "num_attention_heads": 8,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "alibi": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "squared ReLU": {
        "model_type": "nemotron",
        "hidden_size": HIDDEN,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "layer norm and ReLU": {
        "model_type": "opt",
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 1024,
        "num_attention_heads": 8,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "GELU in single operators": {
        "model_type": "gpt2",
        "n_embd": HIDDEN,
        "n_head": 8,
        "n_positions": SEQ,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}


UNFUSED = ("llama", "layer norm and ReLU", "parallel attention and MLP")


def sized(values: Config, layers: int) -> Config:
    """The configuration with so many layers."""
    count = "n_layer" if values["model_type"] == "gpt2" else "num_hidden_layers"
    return {**values, count: layers, "vocab_size": VOCAB}


def real_model(values: Config, attention: str = "sdpa") -> Any:
    """The real model, in bf16, with gradients."""
    config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    config._attn_implementation = attention
    real = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).train()
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return real


def our_model(values: Config) -> Model:
    """The same as we read it."""
    return parse_config(values, file="config.json", name="drawn")


def saved_bytes(model: Any) -> int:
    """Bytes of all tensors that a forward pass saves for backward, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Any) -> Any:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(1, SEQ, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(found.values())


@pytest.mark.parametrize(
    ("family", "attention"), [*((name, "sdpa") for name in FAMILIES), *((name, "eager") for name in UNFUSED)]
)
def test_a_layer_keeps_what_we_count(family: str, attention: str) -> None:
    values = FAMILIES[family]
    two, three = (saved_bytes(real_model(sized(values, layers), attention)) for layers in (2, 3))
    model = our_model(sized(values, 2))
    job = Job(global_batch=1, seq_length=SEQ, flash_attention=attention == "sdpa")
    counts = ActivationModel(model, job, TRANSFORMERS, attention_copies=False)
    ours, measured = counts.block(block_type(model, 0), Strategy(), 1).whole, three - two
    assert ours == pytest.approx(measured, rel=0.04)


class Watch(TorchDispatchMode):  # type: ignore[misc]
    """Bytes that operators read and write, and the most that lived at once of what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, *tensors: Any) -> None:
        """Does not count tensors that were there before."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        shared = {leaf.untyped_storage().data_ptr() for leaf in given}
        if any(leaf.untyped_storage().data_ptr() not in shared for leaf in made):  # not a view
            self.moved += sum(leaf.numel() * leaf.element_size() for leaf in (*given, *made))
        for leaf in made:
            storage = leaf.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def both_ways(function: Callable[..., Any], *inputs: Any) -> tuple[int, int]:
    """Bytes moved forward and backward."""
    with Watch() as forward:
        made = function(*inputs)
    outputs = made if isinstance(made, tuple) else (made,)
    gradients = [torch.ones_like(output) for output in outputs]
    with Watch() as backward:
        torch.autograd.backward(outputs, gradients)
    return forward.moved, backward.moved


def bf16(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()


def test_operators_move_what_we_count() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    size = SEQ * HIDDEN
    norm = both_ways(LlamaRMSNorm(HIDDEN).to(torch.bfloat16), bf16(1, SEQ, HIDDEN))
    gated = both_ways(lambda gate, up: torch.nn.functional.silu(gate) * up, bf16(SEQ, HIDDEN), bf16(SEQ, HIDDEN))
    angles = torch.randn(1, SEQ, 128, dtype=torch.bfloat16)
    turned = both_ways(
        lambda q, k: apply_rotary_pos_emb(q, k, angles, angles), bf16(1, 8, SEQ, 128), bf16(1, 8, SEQ, 128)
    )
    for measured, ours, elements in (
        (norm, eager.NORM, size),
        (gated, eager.GATED, size),
        (turned, eager.ROTARY, 2 * 8 * SEQ * 128),
    ):
        for moved, counted in zip(measured, ours, strict=True):
            assert 2 * counted * elements == pytest.approx(moved, rel=0.06)


def test_the_loss_holds_and_moves_what_we_count() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    vocab = 32_000
    logits, labels = bf16(1, SEQ, vocab), torch.ones(1, SEQ, dtype=torch.long)
    with Watch() as watch:
        loss = ForCausalLMLoss(logits, labels, vocab)
        loss.backward()
    each = watch.peak / logits.numel()
    assert each + 2 == pytest.approx(TRANSFORMERS_LOSS.held, rel=0.02)  # and the logits, as the model made them
    assert watch.moved / logits.numel() == pytest.approx(TRANSFORMERS_LOSS.moved, rel=0.06)


PEAKS = {
    "the loss": ("llama", {"num_hidden_layers": 4, "vocab_size": 32_000}, False),
    "activations": ("llama", {"num_hidden_layers": 16, "vocab_size": 2048}, False),
    "a recomputed layer": ("llama", {"num_hidden_layers": 16, "vocab_size": 2048}, True),
    "recomputed layers and the loss": ("qwen2", {"num_hidden_layers": 8, "vocab_size": 32_000}, True),
    "normalized heads": ("queries and keys normalized", {"num_hidden_layers": 8, "vocab_size": 8192}, False),
    "no gate": ("layer norm and ReLU", {"num_hidden_layers": 8, "vocab_size": 8192}, False),
}


@pytest.mark.parametrize("binds", PEAKS)
def test_the_peak_of_a_step_is_the_real_one(binds: str) -> None:
    """Everything above parameters and gradients, of one micro-batch forward and backward."""
    family, size, recomputes = PEAKS[binds]
    values = {**FAMILIES[family], **size}
    real = real_model(values)
    if recomputes:
        real.gradient_checkpointing_enable()
    ids = torch.ones(1, SEQ, dtype=torch.long)
    with Watch() as watch:
        watch.ignore(*real.parameters(), *real.buffers(), *(parameter.grad for parameter in real.parameters()))
        output = real(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()

    model = our_model(values)
    cluster, job = read_cluster("1x1:a100-80gb"), Job(global_batch=1, seq_length=SEQ, flash_attention=True)
    costs = CostModel(model, cluster, job, CAPABILITIES[Target.DEEPSPEED])
    layers = []
    for layer in build_graph(model).layers:
        full = recomputes and layer.type.kind is LayerKind.BLOCK
        strategy = Strategy(recompute=Recompute.FULL if full else Recompute.NONE)
        layers.append(costs.layer_cost(layer.type, strategy, samples=1, pp=1, num_microbatches=1))
    ours = sum(layer.microbatch for layer in layers) + max(layer.transient_bytes for layer in layers)
    assert ours == pytest.approx(watch.peak, rel=0.02)


class Elementwise(Watch):
    """Without matrix multiplications and attention cores."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.moved
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if any(word in str(function) for word in (".mm.", "addmm", "scaled_dot")):
            self.moved = before
        return result


def moved_by(values: Config, layers: int) -> tuple[int, int]:
    """Bytes that a model moves forward and backward, beside its multiplications."""
    real = real_model(sized(values, layers))
    ids = torch.ones(1, SEQ, dtype=torch.long)
    with Elementwise() as watch:
        output = real(input_ids=ids, labels=ids, use_cache=False)
        forward = watch.moved
        output.loss.backward()
    return forward, watch.moved - forward


@pytest.mark.parametrize("family", ["llama", "queries and keys normalized", "layer norm and ReLU", "weights in fp32"])
def test_a_layer_moves_what_we_count(family: str) -> None:
    values = FAMILIES[family]
    measured = [three - two for two, three in zip(moved_by(values, 2), moved_by(values, 3), strict=True)]
    model, job = our_model(sized(values, 2)), Job(global_batch=1, seq_length=SEQ, flash_attention=True)
    device = read_cluster("1x1:a100-80gb").device
    prices = ComputeModel(model, device, job, efficiency_for(device), TRANSFORMERS)
    ours = prices._block_bytes(block_type(model, 0), SEQ, Shape(tp=1, cp=1, ep=1, etp=1, sp=1, samples=1))
    assert ours == pytest.approx(measured, rel=0.11)
