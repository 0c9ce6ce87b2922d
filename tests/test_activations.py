"""What blocks keep for backward, tensor by tensor, and what each module's recomputation frees."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from tests.test_cost_model import DEVICE, MODEL, make_cluster
from uniap_tune.cost.activations import ActivationModel, Tensors
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import PARAMETERS
from uniap_tune.cost.runtime import RECOMPUTE_MODULES, Runtime
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.spec import DType, Job, Mla, Model, Moe, Precision, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target

DENSE = LayerType(kind=LayerKind.BLOCK)
EXPERTS = LayerType(kind=LayerKind.BLOCK, moe=True)
HEAD = LayerType(kind=LayerKind.HEAD)
SEQ = 4096
DEEPSEEK = replace(
    MODEL,
    hidden_size=7168,
    num_heads=128,
    num_kv_heads=128,
    ffn_size=18432,
    mla=Mla(q_lora_rank=1536, kv_lora_rank=512, qk_nope_dim=128, qk_rope_dim=64, v_dim=128),
    moe=Moe(num_experts=256, top_k=8, expert_ffn_size=2048, shared_ffn_size=2048),
)


def tensors(model: Model, layer: LayerType = EXPERTS, compute: DType = DType.BF16, **axes: Any) -> Tensors:
    """The tensors of one sample."""
    job = Job(global_batch=8, seq_length=SEQ, precision=Precision(compute=compute))
    return ActivationModel(model, job, Runtime(transformer_engine=False), attention_copies=False).block(
        layer, Strategy(**axes), 1
    )


def test_latent_attention_keeps_latents_and_heads_once() -> None:
    found = tensors(DEEPSEEK)
    assert found.latents == 2 * SEQ * (1536 + 512 + 64)
    assert found.latent_normed == 2 * SEQ * (1536 + 512)
    assert found.heads == 2 * SEQ * 128 * (2 * 192 + 128)
    assert found.context == 2 * SEQ * 128 * 128
    assert found.qkv_input == found.mlp_normed == 2 * SEQ * 7168


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("model", "layer"), [(MODEL, DENSE), (DEEPSEEK, EXPERTS)])
def test_what_allocations_keep_is_the_whole(model: Model, layer: LayerType, dropout: float, flash: bool) -> None:
    job = Job(global_batch=8, seq_length=SEQ, flash_attention=flash)
    model = replace(model, hidden_dropout=dropout, attention_dropout=dropout)
    for tp in (1, 4):
        blocks = ActivationModel(model, job, Runtime(transformer_engine=False), attention_copies=False)
        strategy = Strategy(tp=tp)
        kept = sum(size for size, is_kept in blocks.allocations(layer, strategy, 2) if is_kept)
        assert kept == pytest.approx(blocks.block(layer, strategy, 2).whole, rel=1e-6)


def test_experts_keep_their_input_and_the_activation_but_not_their_output() -> None:
    found = tensors(DEEPSEEK)
    routed = 8 * SEQ
    assert found.expert_input == routed * 2 * 7168
    assert found.expert_inner == routed * 2 * 2 * 2048
    assert found.activated == routed * 2 * 2048
    assert found.shared == 2 * SEQ * 3 * 2048
    plain = tensors(replace(DEEPSEEK, gated_mlp=False))
    assert plain.activated == 2 * found.activated  # scaled by a kernel of its own


def test_narrow_formats_keep_narrow_inputs_of_linear_layers() -> None:
    wide, narrow = tensors(MODEL, DENSE), tensors(MODEL, DENSE, DType.FP8)
    tokens, hidden, width = SEQ, MODEL.hidden_size, MODEL.ffn_size
    assert wide.whole - narrow.whole == tokens * (2 * hidden + width)
    assert narrow.heads + narrow.context == 2 * tokens * 4 * hidden


def test_each_module_frees_its_tensors_and_together_they_leave_the_rest() -> None:
    found = tensors(DEEPSEEK)
    alone = {module: found.freed(frozenset({module})) for module in RECOMPUTE_MODULES}
    assert all(alone[module] > 0 for module in RECOMPUTE_MODULES - {"mlp"})
    assert alone["moe"] > alone["moe_act"] + alone["shared_experts"]
    for first, second in combinations(sorted(RECOMPUTE_MODULES), 2):
        assert found.freed(frozenset({first, second})) <= alone[first] + alone[second]
    left = found.attention_input + found.mlp_input + found.latents + found.context
    assert found.whole - found.freed(RECOMPUTE_MODULES) == pytest.approx(left)


def test_modules_a_block_lacks_free_nothing() -> None:
    dense = tensors(MODEL, DENSE)
    assert dense.freed(frozenset({"mlp"})) == dense.mlp_normed + dense.mlp_inner
    for module in ("layernorm", "mla_up_proj", "moe", "moe_act", "shared_experts"):
        assert dense.freed(frozenset({module})) == 0, module


def test_what_is_recomputed_and_offloaded_is_freed_once() -> None:
    found = tensors(DEEPSEEK)
    core = frozenset({"core_attn"})
    assert found.freed(frozenset(), core) == found.heads + found.scores
    assert found.freed(core, core) == found.freed(frozenset(), core)
    assert found.freed(frozenset({"moe_act"}), frozenset({"moe_act"})) == found.expert_inner + found.activated
    assert found.freed(frozenset(), frozenset({"no_such_module"})) == 0


def priced(model: Model, job: Job, layer: LayerType = EXPERTS, **runtime: Any) -> Any:
    """The cost of a layer under expert parallelism over eight devices."""
    device = replace(DEVICE, peak_flops={**DEVICE.peak_flops, DType.FP8: 600e12, DType.MXFP8: 600e12})
    generation = runtime.pop("generation", "hopper")
    cluster = make_cluster(1, replace(device, generation=generation))
    strategy = Strategy(dp=8, ep=8, zero=1, recompute=runtime.pop("recompute", Recompute.NONE))
    cost_model = CostModel(model, cluster, job, CAPABILITIES[Target.MEGATRON], runtime=Runtime(**runtime))
    return cost_model.layer_cost(layer, strategy, samples=1, pp=4, num_microbatches=8)


def test_selective_recomputation_repeats_what_the_engine_names() -> None:
    job = Job(global_batch=8, seq_length=SEQ)
    none = priced(DEEPSEEK, job)
    one, more = (
        priced(DEEPSEEK, job, recompute=Recompute.SELECTIVE, recompute_modules=frozenset(modules))
        for modules in (["moe_act"], ["moe_act", "mla_up_proj"])
    )
    assert none.microbatch > one.microbatch > more.microbatch
    assert none.transient_bytes < one.transient_bytes < more.transient_bytes


@pytest.mark.parametrize(("generation", "copies"), [("hopper", 2), ("blackwell", 1)])
def test_eight_bit_weights_come_beside_or_instead_of_wide_ones(generation: str, copies: int) -> None:
    """Hopper's GEMMs need a transposed copy."""
    wide = Job(global_batch=8, seq_length=SEQ)
    narrow = replace(wide, precision=Precision(compute=DType.FP8))
    plain, beside, instead = (
        priced(DEEPSEEK, job, DENSE, generation=generation, narrow_parameters=narrow_parameters)
        for job, narrow_parameters in ((wide, False), (narrow, False), (narrow, True))
    )
    linear = (beside.static_bytes[PARAMETERS] - plain.static_bytes[PARAMETERS]) / copies
    assert linear == pytest.approx(plain.static_bytes[PARAMETERS] / 2, rel=0.01)
    assert beside.static_bytes[PARAMETERS] - instead.static_bytes[PARAMETERS] == pytest.approx(2 * linear)


def test_a_head_that_predicts_further_tokens_shards_its_experts_and_keeps_a_block() -> None:
    job = Job(global_batch=8, seq_length=SEQ)
    plain, further = (priced(replace(DEEPSEEK, mtp_layers=count), job, HEAD) for count in (0, 1))
    block = priced(DEEPSEEK, job, EXPERTS)
    assert further.transient_bytes - plain.transient_bytes > block.microbatch
    # the module has no more optimizer states than a block and a projection, so that its experts are sharded as theirs
    grown = further.static - plain.static
    projection = 18 * 2 * DEEPSEEK.hidden_size**2 + 18 * DEEPSEEK.vocab_size * DEEPSEEK.hidden_size
    assert block.static < grown < block.static + projection
