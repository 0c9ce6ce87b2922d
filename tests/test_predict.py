"""Predictions of given runs: known values, traps of other estimators, and records that lie."""

import copy
import json
import math
import random
from dataclasses import replace

import pytest

from tests.records import LLAMA, MEASURED, NOT_MEASURED, megatron_record, record
from uniap_tune.adapters.records import RecordLine, evaluate, read_lines, read_run
from uniap_tune.autotp import Vocabulary
from uniap_tune.cost.efficiency import load_efficiency
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.runtime import (
    ENGINE_LOSS,
    MEGATRON_2021,
    MEGATRON_DEEPSPEED_2023,
    NEMO_2024,
    PYTORCH_FSDP,
    TRANSFORMERS,
    Runtime,
)
from uniap_tune.errors import TuneError
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.predict import Run, predict
from uniap_tune.strategy import Strategy
from uniap_tune.units import MIB


def run_of(**changes: object) -> Run:
    return read_run(record(**changes))


def peak(**changes: object) -> float:
    return predict(run_of(**changes)).peak_memory_bytes


def test_a_record_becomes_its_run():
    run = run_of(tp=4, pp=2, dp=1, vp=4)
    assert (run.pp, run.virtual_stages, run.micro_batch, run.num_microbatches) == (2, 4, 1, 128)
    assert sum(layers.count for chunk in run.chunks for layers in chunk) == 34
    assert run.exact


def test_memory_falls_with_what_saves_memory():
    """Megatron's own estimator misses full recompute, context parallelism, sequence parallelism and ZeRO-3."""
    plain = peak()
    assert peak(recompute="full") < 0.75 * plain
    assert peak(recompute="full/block/5") < plain
    assert peak(cp=2, dp=2) < plain
    assert peak(sequence_parallel=False) > plain
    assert peak(zero=3) < plain < peak(zero=0)


def test_time_grows_with_recomputation_and_falls_with_devices():
    seconds = predict(run_of()).step_time_s
    assert predict(run_of(recompute="full")).step_time_s > 1.15 * seconds
    assert predict(run_of(num_gpus=16, dp=8)).step_time_s < 0.55 * seconds
    assert predict(run_of(gbs=256)).step_time_s == pytest.approx(2 * seconds, rel=0.02)


def test_first_and_last_stage_carry_embedding_and_head():
    stages = predict(run_of(tp=1, pp=4, dp=2, gbs=128, mbs=1)).memory_bytes_per_stage
    assert len(stages) == 4
    run = run_of(tp=1, pp=4, dp=2)
    static = [sum(layers.count * cost(run, layers).static for layers in chunk) for chunk in run.chunks]
    table = 128256 * 4096 * (2 + 4 + 12 / 2)
    assert static[0] - static[1] == pytest.approx(table)
    assert static[3] - static[1] == pytest.approx(table + 4096 * (2 + 4 + 12 / 2))


def cost(run, layers):
    model = CostModel(run.model, run.cluster, run.job, run.capabilities, runtime=run.runtime)
    return model.layer_cost(layers.type, layers.strategy, samples=1, pp=run.pp, num_microbatches=run.num_microbatches)


def test_parameters_per_rank_are_megatrons():
    """Llama-3-8B with the layout Et*7|t*9|t*9|t*7,L at TP 2, as built by megatron-core on the meta device."""
    run = run_of()
    model = CostModel(run.model, run.cluster, run.job, run.capabilities, runtime=run.runtime)

    def parameters(kind: LayerKind) -> float:
        strategy = Strategy(tp=2, dp=1, sequence_parallel=True)
        layer = model.layer_cost(LayerType(kind=kind), strategy, samples=1, pp=4, num_microbatches=4)
        return layer.static_bytes["parameters"] / 2

    embedding, block, head = (parameters(kind) for kind in (LayerKind.EMBEDDING, LayerKind.BLOCK, LayerKind.HEAD))
    stages = [embedding + 7 * block, 9 * block, 9 * block, 7 * block + head]
    assert [round(stage / 1e6, 2) for stage in stages] == pytest.approx([1026.09, 981.54, 981.54, 1026.09], abs=0.06)


def test_uneven_stages_are_taken_as_given():
    plan = {
        "layer_partitions": [10, 22],
        "gradient_checkpointing": [4, 0],
        "stage_strategies": [[1, 2, 4, 0, 0, 1, 0.0, 0.0, 0.0, 0.0]] * 2,
    }
    run = run_of(strategy=plan, num_gpus=16)
    assert [[layers.count for layers in chunk] for chunk in run.chunks] == [[1, 4, 6], [22, 1]]
    assert (run.micro_batch, run.num_microbatches) == (2, 64)
    stages = predict(run).memory_bytes_per_stage
    assert stages[1] > stages[0]


def test_a_tiny_megatron_run_is_counted_to_the_mebibyte():
    """Measured by Megatron-LM's functional test gpt3_mcore_te_tp2_pp2 on A100: 487.1 MB held, 1900.2 MB at the peak."""
    prediction = predict(read_run(megatron_record()))
    assert prediction.steady_memory_bytes == pytest.approx(487.1e6, abs=5 * MIB)
    assert prediction.peak_memory_bytes == pytest.approx(1900.2e6, abs=8 * MIB)


def test_gradients_of_the_output_matrix_that_wait():
    """Measured by Megatron-LM's functional test gpt3_mcore_te_tp2_pp2_defer_embedding_wgrad_compute on A100."""
    waiting = {"defer_embedding_wgrad_compute": True, "no_gradient_accumulation_fusion": None}
    prediction = predict(read_run(megatron_record(**waiting, wgrad_deferral_limit=2)))
    assert prediction.peak_memory_bytes == pytest.approx(2340.6e6, rel=0.01)
    every, most = (predict(read_run(megatron_record(**waiting, wgrad_deferral_limit=n))) for n in (0, 100))
    assert every.peak_memory_bytes == most.peak_memory_bytes > 1.15 * prediction.peak_memory_bytes
    assert every.steady_memory_bytes == prediction.steady_memory_bytes
    alone = {"pipeline_model_parallel_size": 1, **waiting}
    at_once = predict(read_run(megatron_record(**{**alone, "defer_embedding_wgrad_compute": None})))
    assert predict(read_run(megatron_record(**alone))).peak_memory_bytes == at_once.peak_memory_bytes


def test_softmax_of_single_operators_keeps_more_and_takes_longer():
    """Measured by Megatron-LM's functional test gpt3_mcore_tp2_pp2_uninstall_te on A100: 2086.5 MB at the peak."""
    local = {"transformer_impl": "local", "attention_backend": None, "bf16": None, "fp16": True}
    separate = {**local, "no_masked_softmax_fusion": True}
    fused, narrow = (predict(read_run(megatron_record(**args))) for args in (local, separate))
    wide = predict(read_run(megatron_record(**separate, apply_query_key_layer_scaling=True)))
    assert wide.peak_memory_bytes == pytest.approx(2086.5e6, rel=0.01)
    assert fused.peak_memory_bytes == narrow.peak_memory_bytes < wide.peak_memory_bytes
    assert fused.step_time_s < narrow.step_time_s == wide.step_time_s

    def added_by_the_flag(micro_batch: int) -> float:
        few = {"num_attention_heads": 2, "micro_batch_size": micro_batch, "apply_query_key_layer_scaling": True}
        peaks = [predict(read_run(megatron_record(**args, **few))).peak_memory_bytes for args in (local, separate)]
        return peaks[1] - peaks[0]

    assert added_by_the_flag(4) > 0 == added_by_the_flag(2)  # two (sample, head) pairs a rank do not fit the kernel


def test_megatron_stages_of_their_own_size():
    four = megatron_record(
        pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=2, decoder_last_pipeline_num_layers=2
    )
    assert [sum(layers.count for layers in chunk) for chunk in read_run(four).chunks] == [3, 4, 4, 3]
    two = megatron_record(decoder_first_pipeline_num_layers=5, decoder_last_pipeline_num_layers=7)
    assert [sum(layers.count for layers in chunk) for chunk in read_run(two).chunks] == [6, 8]
    with pytest.raises(TuneError, match="do not divide evenly"):
        read_run(megatron_record(decoder_first_pipeline_num_layers=12))
    absurd = megatron_record(pipeline_model_parallel_size=10**9)
    with pytest.raises(TuneError, match="too many for 12 layers"):
        read_run({**absurd, "num_gpus": None})


def test_the_distributed_optimizer_of_a_megatron_run():
    plain = predict(read_run(megatron_record())).steady_memory_bytes
    sharded = predict(read_run(megatron_record(use_distributed_optimizer=True))).steady_memory_bytes
    copies = predict(
        read_run(megatron_record(use_distributed_optimizer=True, num_distributed_optimizer_instances=2))
    ).steady_memory_bytes
    assert sharded < copies
    assert copies <= plain <= copies + 4 * MIB  # what the allocator leaves uncut of single tensors


def test_fused_attention_needs_no_square_matrix():
    unfused = predict(read_run(megatron_record())).peak_memory_bytes
    assert predict(read_run(megatron_record(attention_backend="flash"))).peak_memory_bytes < 0.8 * unfused


def test_bands_widen_with_assumptions():
    known, assumed = predict(run_of()), predict(run_of(recompute=None))
    assert assumed.assumptions[-1] == "no recomputation"
    assert known.step_time_low_s < known.step_time_s < known.step_time_high_s
    assert assumed.step_time_high_s > known.step_time_high_s
    assert assumed.step_time_s == known.step_time_s


UNDER_DEEPSPEED = replace(  # of a gated model of hidden size 4,096 whose embedding is not tied
    TRANSFORMERS, gradient_bucket=50_000_000, column_layers=5, vocabulary=Vocabulary.GATHERED
)


@pytest.mark.parametrize(
    ("changes", "runtime"),
    [
        ({"framework": "torchtitan"}, PYTORCH_FSDP),
        ({"framework": "transformers"}, UNDER_DEEPSPEED),
        ({"framework": "DeepSpeed 0.19", "software": "torch.compile"}, replace(UNDER_DEEPSPEED, eager=False)),
        ({"framework": "DeepSpeed", "precision": "fp16"}, UNDER_DEEPSPEED),
        ({"framework": "torchtitan", "software": "torch.compile"}, replace(PYTORCH_FSDP, eager=False)),
        ({"precision": "fp16", "gpu": "A100"}, MEGATRON_2021),
        ({"precision": "fp16", "gpu": None, "hardware": "A100 8/node (Megatron-DeepSpeed)"}, MEGATRON_DEEPSPEED_2023),
        ({"framework": "Megatron-LM 2020"}, MEGATRON_2021),
        ({"software": "NeMo Megatron 22.08"}, MEGATRON_2021),
        ({"software": "NeMo 24.05"}, replace(NEMO_2024, overlap_tensor=True)),
        ({"framework": "Megatron-LM 2024", "precision": "fp16"}, Runtime(loss=ENGINE_LOSS)),
    ],
)
def test_the_stated_engine_selects_how_it_runs(changes, runtime):
    assert run_of(**changes).runtime == runtime


def test_software_of_before_2023_had_neither_sequence_parallelism_nor_flash_attention():
    tensor = {"tp": 2, "zero": None}
    old, new = (run_of(framework=f"Megatron-LM {year}", **tensor) for year in (2022, 2023))
    assert [run.job.flash_attention for run in (old, new)] == [False, True]
    strategies = [run.chunks[0][0].strategy for run in (old, new)]
    assert [(s.sequence_parallel, s.zero) for s in strategies] == [(False, 0), (True, 1)]
    # neither versions of libraries nor a device's name tell how old the engine is
    assert run_of(framework="Megatron-LM", software="NCCL 2.20.05, CUDA 12.10", **tensor).job.flash_attention


def test_a_run_that_happened_did_fit():
    big = {"model": {**LLAMA, "num_hidden_layers": 80}, "recompute": "full"}
    evaluated = evaluate(RecordLine(0, record(**big)))
    assert evaluated.prediction is not None
    assert any("16-bit gradients" in text for text in evaluated.prediction.assumptions)
    proposal = evaluate(RecordLine(0, record(**big, step_time_s=None)))
    assert proposal.prediction is not None
    assert not proposal.prediction.fits


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "lora"}, "adapters"),
        ({"model": None}, "no model"),
        ({"gpu": "GTX 280"}, "unknown GPU"),
        ({"gpu": None}, "names no GPU"),
        ({"precision": "int3"}, "precision"),
        ({"num_gpus": None}, "num_gpus"),
        ({"num_gpus": 7}, "num_gpus(7)"),
        ({"tp": -2}, "'tp'"),
        ({"tp": 2.5}, "'tp'"),
        ({"mbs": "many"}, "'mbs'"),
        ({"mbs": float("nan")}, "'mbs'"),
        ({"pp": 64, "num_gpus": 512}, "64 stages"),
        ({"pp": 4, "vp": 99, "num_gpus": 32}, "virtual stages"),
        ({"model": {**LLAMA, "num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"model": {**LLAMA, "head_dim": None, "num_attention_heads": 33}}, "multiple"),
        ({"model": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 8}}, "routes to 8"),
        ({"model": "llama"}, "object"),
        ({"settings": 3}, "object"),
    ],
)
def test_what_cannot_be_predicted_says_why(changes, reason):
    evaluated = evaluate(RecordLine(3, record(**changes)))
    assert evaluated.prediction is None
    assert reason in evaluated.reason
    assert evaluated.as_dict() == {"line": 3, "id": "llama", "skipped": evaluated.reason}


def test_lines_that_are_no_records_are_reported(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(f"{json.dumps(record())}\n\nnot json\n[1]\n{'[' * 5000}\n", encoding="utf-8")
    lines = list(read_lines(path))
    assert [line.line for line in lines] == [0, 2, 3, 4]
    assert [bool(line.problem) for line in lines] == [False, True, True, True]


VALUES: list[object] = [
    None,
    -1,
    0,
    10**9,
    10**15,
    0.5,
    "",
    "x",
    [],
    {},
    True,
    float("inf"),
    float("nan"),
    "8",
    [None],
    {"a": 1},
]


def test_damaged_records_give_a_reason_never_a_crash():
    """Any field may be missing, negative, absurd or of another type."""
    rng = random.Random(0)
    originals: list[dict[str, object]] = [
        record(),
        record(tp=1, pp=4, dp=2, vp=2, settings={"expert_tensor_parallel_size": 1, "cpu_offloading_num_layers": 3}),
        megatron_record(num_experts=4, expert_model_parallel_size=2, decoder_first_pipeline_num_layers=3),
        record(
            strategy={
                "layer_partitions": [16, 16],
                "gradient_checkpointing": [4, 0],
                "stage_strategies": [[1, 4, 1, 0, 0, 1, 0.0, 0.0, 0.0, 0.0]] * 2,
            }
        ),
        {**megatron_record(), "test": "bert/case"},
        {**megatron_record(encoder_num_layers=4, encoder_seq_length=512), "test": "t5/case"},
        record(
            model={
                **LLAMA,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 512,
                "kv_lora_rank": 64,
            },
            recompute="selective:moe_act",
            settings={"pp_layout": "Et*32L"},
            source="NeMo",
        ),
        record(ops_per_stage=[200, 216], recompute_ops_per_stage=[26, 0], tp_per_stage=[4, 4], dp_per_stage=[1, 1]),
    ]
    for _ in range(1500):
        damaged = copy.deepcopy(rng.choice(originals))
        for _ in range(rng.randint(1, 3)):
            inner = rng.choice([damaged, *[value for value in damaged.values() if isinstance(value, dict) and value]])
            inner[rng.choice(sorted(inner))] = rng.choice(VALUES)
        evaluated = evaluate(RecordLine(0, damaged))
        if evaluated.prediction is None:
            assert evaluated.reason
        else:
            assert math.isfinite(evaluated.prediction.step_time_s)
            assert evaluated.prediction.peak_memory_bytes > 0


@pytest.mark.skipif(not MEASURED.is_dir(), reason=NOT_MEASURED)
def test_only_what_cannot_be_meant_is_skipped():
    reasons = ("adapters", "not a transformer alone", "offloads to the host")
    for path in sorted(MEASURED.glob("*.jsonl")):
        for line in read_lines(path):
            evaluated = evaluate(line)
            assert evaluated.prediction is not None or any(reason in evaluated.reason for reason in reasons)


def test_unknown_fields_change_nothing():
    known = predict(run_of())
    assert predict(run_of(colour="blue", nested={"deep": [1]})) == known


def test_read_run_raises_only_errors_people_can_act_on():
    with pytest.raises(TuneError) as caught:
        read_run(record(gpu="GTX 280"))
    assert caught.value.fix


def test_recomputation_of_a_configuration_file_is_believed_where_the_model_needs_it():
    def configured(layers: int) -> list[str]:
        model = {"hidden": 2048, "layers": layers, "heads": 16, "ffn": 8192, "vocab": 50257, "seq": 1024}
        run = run_of(model=model, seq_length=None, tp=1, dp=8, mbs=8, recompute="full (config use_checkpoint=true)")
        return sorted({str(part.strategy.recompute) for chunk in run.chunks for part in chunk})

    assert configured(24) == ["none"]
    assert configured(96) == ["full"]


def test_attention_of_the_generation_before_is_slower_only_on_its_successors():
    def seconds(gpu: str, source: str) -> float:
        return predict(run_of(gpu=gpu, source=source, seq_length=65536, cp=2, dp=2, gbs=16)).step_time_s

    for gpu, slower in (("H100", True), ("A100", False)):
        nemo, bridge = seconds(gpu, "NVIDIA/NeMo"), seconds(gpu, "NVIDIA-NeMo/Megatron-Bridge")
        assert (nemo > 1.1 * bridge) is slower


def test_tensor_parallelism_is_exposed_unless_the_software_overlaps_it():
    plain, bridge = run_of(tp=8, dp=1), run_of(tp=8, dp=1, source="NVIDIA-NeMo/Megatron-Bridge")
    plain, bridge = (replace(run, runtime=replace(run.runtime, cuda_graphs=True)) for run in (plain, bridge))
    assert not plain.runtime.overlap_tensor
    assert bridge.runtime.overlap_tensor
    overlapped = replace(plain, runtime=replace(plain.runtime, overlap_tensor=True))
    saved = predict(plain).step_time_s - predict(overlapped).step_time_s
    # two all-reduces of 8,192 x 4,096 16-bit elements each way of 32 layers, over eight devices, at 450 GB/s nominal
    efficiency = load_efficiency("hopper")
    reduced = 2 * 7 / 8 * 2 * 8192 * 4096 / (450e9 * efficiency.link)
    transferred = 4 * 32 * 128 * reduced * (1 - efficiency.tp_exposed)
    assert transferred < saved < 1.2 * transferred  # the rest are latencies
    without_sequence = run_of(tp=8, dp=1, source="NVIDIA-NeMo/Megatron-Bridge", sequence_parallel=False)
    without_sequence = replace(without_sequence, runtime=bridge.runtime)
    assert predict(without_sequence).step_time_s > predict(bridge).step_time_s
    assert predict(overlapped).peak_memory_bytes - predict(plain).peak_memory_bytes == 10 * 2 * 8192 * 4096


def test_gradients_are_exposed_unless_the_software_or_the_record_says_otherwise():
    """Megatron-LM reduces gradients behind backward only with --overlap-grad-reduce; NVIDIA's recipes give it."""
    job = {"tp": 1, "dp": 8, "gbs": 8}
    plain, bridge = run_of(**job), run_of(**job, source="NVIDIA-NeMo/Megatron-Bridge")
    said, denied = run_of(**job, overlap_grad_reduce=True), run_of(**job, source="NeMo", overlap_grad_reduce=False)
    overlaps = [run.capabilities.overlap_gradient_reduce for run in (plain, bridge, said, denied)]
    assert overlaps == [False, True, True, False]
    exposed = predict(plain).step_time_s - predict(said).step_time_s
    # fp32 gradients scattered and bf16 parameters gathered over eight devices at 450 GB/s nominal
    moved = 7 / 8 * (4 + 2) * 8.03e9 / (450e9 * load_efficiency("hopper").link)
    assert 0.5 * moved < exposed < moved


def test_virtual_stages_that_a_source_leaves_out_are_those_of_nvidias_recipes():
    """``missing`` tells a pipeline without virtual stages from one whose page does not print them."""
    job = {"pp": 4, "tp": 2, "dp": 1, "source": "NVIDIA/NeMo"}
    for changes, virtual in (
        ({}, 1),
        ({"missing": ["vp"]}, 8),
        ({"missing": ["vp"], "vp": 2}, 2),
        ({"missing": ["vp"], "source": "a page"}, 1),
        ({"missing": "vp"}, 1),
    ):
        assert run_of(**{**job, **changes}).virtual_stages == virtual
    assert not run_of(**job, missing=["vp"]).exact
