"""What records say about memory: recomputed modules, layouts, recipes of NVIDIA's software, and what they leave out."""

from __future__ import annotations

from typing import Any

import pytest

from tests.records import LLAMA, megatron_record, record
from uniap_tune.adapters.records import Evaluated, RecordLine, evaluate, read_run
from uniap_tune.errors import InputError
from uniap_tune.graph import LayerKind
from uniap_tune.predict import Run, predict
from uniap_tune.spec import Recompute

DEEPSEEK = {
    "name": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "hidden_act": "swiglu",
}


def deepseek(**changes: object) -> dict[str, object]:
    """DeepSeek-V3 on 256 GB200 in MXFP8, as Megatron-Bridge's documentation prints it."""
    settings: dict[str, object] = {"recompute_modules": ["mla_up_proj"]}
    plain: dict[str, Any] = {
        "model": DEEPSEEK,
        "gpu": "GB200",
        "gpu_mem_gb": 192,
        "num_gpus": 256,
        "seq_length": 4096,
        "tp": 1,
        "pp": 4,
        "vp": 4,
        "ep": 64,
        "dp": 64,
        "gbs": 4096,
        "precision": "MXFP8",
        "recompute": "selective:mla_up_proj",
        "source": "NVIDIA-NeMo/Megatron-Bridge docs/performance-summary.md",
        "settings": settings,
    }
    return record(**{**plain, **changes})


def evaluated(changed: dict[str, object]) -> Evaluated:
    """The answer to one record, which must be predicted."""
    found = evaluate(RecordLine(0, changed))
    assert found.prediction is not None, found.reason
    return found


def blocks(run: Run) -> list[float]:
    """Transformer layers of each chunk."""
    return [sum(part.count for part in chunk if part.type.kind is LayerKind.BLOCK) for chunk in run.chunks]


def test_a_mixture_of_experts_that_ran_fits() -> None:
    assert evaluated(deepseek()).prediction.fits  # type: ignore[union-attr]
    without = evaluated(deepseek(recompute="none"))
    with_up = evaluated(deepseek())
    assert without.prediction.peak_memory_bytes > with_up.prediction.peak_memory_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("said", "modules"),
    [
        ("selective", {"core_attn"}),
        ("selective(attention)", {"core_attn"}),
        ("selective:mla_up_proj,mlp", {"mla_up_proj", "mlp"}),
        ("selective:moe_act,layernorm,unheard_of", {"moe_act", "layernorm"}),
    ],
)
def test_selective_recomputation_names_modules(said: str, modules: set[str]) -> None:
    run = read_run(deepseek(recompute=said))
    assert run.runtime.recompute_modules == modules
    assert run.chunks[0][1].strategy.recompute is Recompute.SELECTIVE
    assert any("unheard_of" in assumption for assumption in run.assumptions) == ("unheard_of" in said)


def test_megatron_arguments_name_modules_too() -> None:
    for value in (["moe_act", "layernorm"], "moe_act layernorm", "moe_act,layernorm"):
        run = read_run(megatron_record(recompute_granularity="selective", recompute_modules=value))
        assert run.runtime.recompute_modules == {"moe_act", "layernorm"}


def test_a_layout_is_followed() -> None:
    layout = {"pp_layout": "Et*4|(t*4|)*14tmL"}
    run = read_run(deepseek(settings=layout))
    assert blocks(run) == [4.0] * 15 + [1.0]
    assert run.model.mtp_layers == 1


def test_layers_that_do_not_divide_leave_the_last_chunk_fewer_where_the_head_predicts_further() -> None:
    layout = {"pp_layout": "Et|(tt|)*30mL"}  # 32 chunks, which a run of 16 contradicts
    with pytest.raises(InputError, match="does not fit: it has 32 stages, the record 4 times 4"):
        read_run(deepseek(settings=layout))
    with pytest.raises(InputError, match="grammar"):
        read_run(deepseek(settings={"pp_layout": "Ettx|L"}))
    assert blocks(read_run(deepseek())) == [4.0] * 13 + [3.0] * 3


def test_nvidias_recipes_reduce_gradients_in_sixteen_bits() -> None:
    known, other = read_run(deepseek()), read_run(deepseek(source="a blog"))
    assert (known.job.precision.gradient_bytes, other.job.precision.gradient_bytes) == (2, None)
    assert (known.job.state_bytes, other.job.state_bytes) == (4, 8)  # DeepSeek's moments are bf16
    assert (known.runtime.narrow_parameters, other.runtime.narrow_parameters) == (True, False)
    assert predict(known).steady_memory_bytes < predict(other).steady_memory_bytes


def test_unstated_recomputation_is_as_little_as_fits() -> None:
    big = {"model": {**LLAMA, "num_hidden_layers": 24}, "tp": 1, "dp": 8, "mbs": 4, "step_time_s": None}
    assert not evaluated(record(**big, recompute="none")).prediction.fits  # type: ignore[union-attr]
    found = evaluated(record(**big, recompute=None))
    assert found.prediction is not None
    assert found.prediction.fits
    assert found.run is not None
    modes = {part.strategy.recompute for chunk in found.run.chunks for part in chunk if part.type.kind == "block"}
    assert modes == {Recompute.NONE, Recompute.FULL}
    assert any("recomputed layers" in assumption for assumption in found.prediction.assumptions)


def test_the_fp8_recipe_of_llama_3_8b_fits_as_its_readme_runs_it() -> None:
    """Megatron-LM, examples/llama: context parallelism of 2 by default; without it, it is at the edge of 80 GB."""
    arguments: dict[str, object] = {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "group_query_attention": True,
        "num_query_groups": 8,
        "seq_length": 8192,
        "position_embedding_type": "rope",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "swiglu": True,
        "attention_backend": "fused",
        "untie_embeddings_and_output_weights": True,
        "disable_bias_linear": True,
        "micro_batch_size": 1,
        "global_batch_size": 128,
        "grad_reduce_in_bf16": True,
        "cross_entropy_loss_fusion": True,
        "fp8_format": "hybrid",
        "fp8_param_gather": True,
        "use_distributed_optimizer": True,
        "vocab_size": 128256,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "no_gradient_accumulation_fusion": None,
        "deterministic_mode": None,
    }
    predictions = [
        evaluated({**megatron_record(**arguments, context_parallel_size=cp), "hardware": "H100"}).prediction
        for cp in (1, 2)
    ]
    alone, two = (prediction for prediction in predictions if prediction is not None)
    assert two.fits
    assert alone.peak_memory_bytes == pytest.approx(80e9, rel=0.1)
