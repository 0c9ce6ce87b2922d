"""Plan -> arguments of Megatron-LM. That Megatron takes them is shown in tests/conformance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.launches import launch, megatron_launches
from tests.plans import make_plan, make_stage
from tests.test_render_layout import expand
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import read_model
from uniap_tune.cost.model import CostModel
from uniap_tune.errors import UnsupportedError
from uniap_tune.graph import block_type
from uniap_tune.render import render
from uniap_tune.render.megatron import megatron_launch
from uniap_tune.render.megatron_model import model_arguments, padded_vocabulary
from uniap_tune.render.shell import Value
from uniap_tune.spec import DType, Job, Mla, Moe, OptimizerName, Position, Precision, QkNorm, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target

JOB = Job(global_batch=64, seq_length=4096)
NODE = read_cluster("1x8:h100")
LLAMA = read_model("llama-2-7b")
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def arguments(strategy: dict[str, Any], **more: Any) -> dict[str, Value]:
    """The arguments for Llama-2-7B on one stage."""
    made = launch("llama-2-7b", "1x8:h100", [32], strategy, **more)
    return megatron_launch(made.plan, made.model, made.cluster, made.job).arguments


def environment(cluster: str, strategy: dict[str, Any]) -> dict[str, str | None]:
    """The environment for Llama-2-7B on one stage."""
    made = launch("llama-2-7b", cluster, [32], strategy)
    return dict(megatron_launch(made.plan, made.model, made.cluster, made.job).environment)


def test_zero_stages() -> None:
    sharding = ("--use-distributed-optimizer", "--use-megatron-fsdp", "--data-parallel-sharding-strategy")
    found = [tuple(arguments({"dp": 8, "zero": zero}).get(name) for name in sharding) for zero in range(4)]
    assert found == [
        (None, None, None),
        (True, None, None),
        (True, True, "optim_grads"),
        (True, True, "optim_grads_params"),
    ]


@pytest.mark.parametrize(
    ("model", "cluster", "strategy", "expected"),
    [
        ("llama-2-7b", "1x8:h100", {"tp": 8, "sequence_parallel": True}, True),
        ("llama-2-7b", "1x8:b200", {"tp": 8, "sequence_parallel": True}, True),
        ("llama-2-7b", "1x8:h100", {"tp": 8, "sequence_parallel": False}, False),
        ("llama-2-7b", "1x8:h100", {"dp": 8}, False),
        ("llama-2-7b", "1x8:a100", {"tp": 8, "sequence_parallel": True}, False),
        ("llama-2-7b", "2x4:gb200", {"tp": 8, "sequence_parallel": True}, False),
        ("llama-2-7b", "1x8:h100-pcie", {"tp": 8, "sequence_parallel": True}, False),
        ("mixtral-8x7b", "1x8:h100", {"tp": 8, "etp": 8, "sequence_parallel": True}, False),
    ],
)
def test_tensor_parallelism_overlaps_where_the_hardware_can(
    model: str, cluster: str, strategy: dict[str, Any], expected: bool
) -> None:
    """As it is priced: user buffers multicast through the NVSwitches of Hopper and Blackwell."""
    made = launch(model, cluster, [32], strategy)
    found = megatron_launch(made.plan, made.model, made.cluster, made.job).arguments
    assert ("--tp-comm-overlap" in found) is expected
    costs = CostModel(made.model, made.cluster, made.job, CAPABILITIES[Target.MEGATRON])
    exposed = CostModel(
        made.model, made.cluster, made.job, costs.capabilities, runtime=replace(costs.runtime, overlap_tensor=False)
    )
    block, grid = block_type(made.model, 0), made.plan.strategies[0]
    seconds = [c.layer_cost(block, grid, samples=1, pp=1, num_microbatches=1).time for c in (costs, exposed)]
    assert (seconds[0] < seconds[1]) is expected


def test_overlap_only_where_there_is_something_to_overlap() -> None:
    assert "--overlap-grad-reduce" not in arguments({"tp": 8})
    assert "--overlap-grad-reduce" in arguments({"dp": 8})
    assert "--overlap-param-gather" not in arguments({"dp": 8})
    assert "--overlap-param-gather" in arguments({"dp": 8, "zero": 1})


@pytest.mark.parametrize(
    ("cluster", "strategy", "expected"),
    [
        ("1x8:h100", {"dp": 8, "zero": 1}, {}),
        ("1x8:h100", {"tp": 2, "dp": 4}, {CONNECTIONS: "1"}),
        ("1x8:h100", {"cp": 2, "dp": 4}, {CONNECTIONS: "1"}),
        ("1x8:h100", {"dp": 8, "zero": 3}, {CONNECTIONS: None}),
        ("1x8:h100", {"tp": 2, "dp": 4, "zero": 2}, {CONNECTIONS: None}),
        ("1x8:b200", {"tp": 2, "dp": 4}, {CONNECTIONS: "32"}),
        ("1x8:b200", {"dp": 8, "zero": 3}, {CONNECTIONS: "32"}),
    ],
)
def test_device_connections(cluster: str, strategy: dict[str, Any], expected: dict[str, str | None]) -> None:
    assert environment(cluster, strategy) == expected


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (Precision(), {"--bf16": True, "--attention-backend": "auto"}),
        (Precision(gradient_bytes=4), {"--bf16": True, "--attention-backend": "auto"}),
        (
            Precision(gradient_bytes=2),
            {"--bf16": True, "--grad-reduce-in-bf16": True, "--attention-backend": "auto"},
        ),
        (
            Precision(compute=DType.FP16),
            {"--fp16": True, "--accumulate-allreduce-grads-in-fp32": True, "--attention-backend": "auto"},
        ),
        (Precision(compute=DType.FP16, gradient_bytes=2), {"--fp16": True, "--attention-backend": "auto"}),
        (Precision(compute=DType.FP32), {"--attention-backend": "unfused"}),
        (
            Precision(compute=DType.NVFP4),
            {"--bf16": True, "--fp4-format": "e2m1", "--fp4-recipe": "nvfp4", "--attention-backend": "auto"},
        ),
    ],
)
def test_precision(precision: Precision, expected: dict[str, Value]) -> None:
    found = arguments({"dp": 8}, precision=precision)
    about = ("16", "fp32", "fp8", "fp4", "attention-backend")
    assert {name: value for name, value in found.items() if any(word in name for word in about)} == expected


def test_attention_without_flash_is_unfused() -> None:
    assert arguments({"dp": 8}, flash_attention=False)["--attention-backend"] == "unfused"


def test_old_hardware_is_given_what_it_has() -> None:
    half = Precision(compute=DType.FP16)
    volta = launch("llama-2-7b", "1x8:v100-32gb", [32], {"dp": 8}, precision=half)
    found = megatron_launch(volta.plan, volta.model, volta.cluster, volta.job).arguments
    assert found["--attention-backend"] == "unfused"
    assert "--transformer-impl" not in found
    assert "plan with --no-flash-attention" in volta.files()["launch.sh"]
    told = launch("llama-2-7b", "1x8:v100-32gb", [32], {"dp": 8}, precision=half, flash_attention=False)
    assert "Note" not in told.files()["launch.sh"]

    pascal = launch("gpt2", "1x8:titan-xp", [12], {"tp": 2, "dp": 4}, seq_length=1024, precision=half)
    found = megatron_launch(pascal.plan, pascal.model, pascal.cluster, pascal.job).arguments
    assert (found["--transformer-impl"], found["--no-persist-layer-norm"]) == ("local", True)
    assert "sequence parallelism needs Apex" in pascal.files()["launch.sh"]


def test_optimizers() -> None:
    assert arguments({"dp": 8}, optimizer=OptimizerName.SGD)["--sgd-momentum"] == 0.9
    plain = arguments({"dp": 8}, optimizer=OptimizerName.SGD, optimizer_state_bytes=0)
    assert plain["--sgd-momentum"] == 0.0
    assert "--adam-beta1" not in plain
    narrow = arguments({"dp": 8, "zero": 1}, optimizer_state_bytes=4)
    assert (narrow["--exp-avg-dtype"], narrow["--exp-avg-sq-dtype"]) == ("bf16", "bf16")
    assert narrow["--use-precision-aware-optimizer"] is True
    with pytest.raises(UnsupportedError, match="only in the distributed optimizer"):
        arguments({"dp": 8}, optimizer_state_bytes=4)


def recompute(blocks: list[int], **more: Any) -> list[Value | None]:
    """Granularity, method and number of layers."""
    made = launch("llama-2-7b", "1x8:h100", blocks, {"recompute": more.pop("mode", Recompute.NONE)}, **more)
    found = megatron_launch(made.plan, made.model, made.cluster, made.job).arguments
    return [found.get(f"--recompute-{name}") for name in ("granularity", "method", "num-layers")]


def test_recompute() -> None:
    assert recompute([32]) == [None, None, None]
    assert recompute([32], mode=Recompute.SELECTIVE) == ["selective", None, None]
    assert recompute([16, 16], mode=Recompute.FULL) == ["full", "uniform", 1]
    assert recompute([16, 16], full=[16, 16]) == ["full", "uniform", 1]
    assert recompute([16, 16], full=[5, 5]) == ["full", "block", 5]
    # a stage of fewer blocks recomputes all it has
    assert recompute([3, 16, 13, 0], full=[3, 7, 7, 0]) == ["full", "block", 7]


@pytest.mark.parametrize("full", [[5, 4], [0, 5], [5, 0]])
def test_different_recompute_in_stages_is_refused(full: list[int]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        recompute([16, 16], full=full)
    assert "the same N for all" in caught.value.why


def test_selective_with_full_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="recomputation"):
        recompute([16, 16], mode=Recompute.SELECTIVE, full=[2, 2])


def test_different_grids_are_refused() -> None:
    plan = make_plan(Target.MEGATRON, [32], Strategy(dp=8), JOB, microbatches=8)
    stage = plan.stages[0]
    mixed = replace(stage, strategies=(Strategy(tp=2, dp=4), *stage.strategies[1:]))
    with pytest.raises(UnsupportedError) as caught:
        render(replace(plan, stages=(mixed,)), LLAMA, NODE, JOB)
    assert "tp1 dp8 z0, tp2 dp4 z0" in caught.value.why


def test_sequence_parallelism_of_some_layers_is_refused() -> None:
    grid = Strategy(tp=2, dp=4)
    stage = make_stage(["embedding", "head"], [grid, replace(grid, sequence_parallel=True)])
    plan = replace(make_plan(Target.MEGATRON, [32], grid, JOB, microbatches=8), stages=(stage,))
    with pytest.raises(UnsupportedError):
        render(plan, LLAMA, NODE, JOB)


def test_gpipe_is_refused() -> None:
    plan = make_plan(Target.MEGATRON, [16, 16], Strategy(dp=4), JOB, microbatches=8, schedule="gpipe")
    with pytest.raises(UnsupportedError, match="gpipe"):
        render(plan, LLAMA, NODE, JOB)


def test_the_free_space_has_no_launch_files() -> None:
    plan = make_plan(Target.ANY, [32], Strategy(dp=8), JOB, microbatches=8)
    assert render(plan, LLAMA, NODE, JOB) == {}


def model(name: str, tp: int = 1, **changes: Any) -> dict[str, Value]:
    """The model's arguments."""
    return model_arguments(replace(read_model(name), **changes), JOB, tp)


def test_model_arguments_of_families() -> None:
    llama = model("llama-3.1-70b")
    assert llama["--num-query-groups"] == 8
    assert llama["--rotary-base"] == 500000
    assert llama["--use-rope-scaling"] is True
    assert llama["--max-position-embeddings"] == 131072
    assert "--kv-channels" not in llama
    gpt = model("gpt-3-175b")
    assert gpt["--position-embedding-type"] == "learned_absolute"
    assert gpt["--max-position-embeddings"] == 2048
    assert "--swiglu" not in gpt
    assert "--disable-bias-linear" not in gpt
    assert "--untie-embeddings-and-output-weights" not in gpt
    assert gpt["--hidden-dropout"] == 0.1
    qwen = model("qwen3-32b")
    assert (qwen["--kv-channels"], qwen["--qk-layernorm"]) == (128, True)
    assert model("qwen2.5-7b")["--add-qkv-bias"] is True
    nemotron = model("nemotron-4-15b")
    assert (nemotron["--squared-relu"], nemotron["--apply-layernorm-1p"], nemotron["--rotary-percent"]) == (
        True,
        True,
        0.5,
    )


def test_model_arguments_of_features() -> None:
    assert model("llama-2-7b", qk_norm=QkNorm.L2)["--qk-l2-norm"] is True
    assert model("llama-2-7b", position=Position.NONE)["--position-embedding-type"] == "none"
    scaled = model("llama-2-7b", rope_scaling="linear", rope_scaling_factor=4.0)
    assert scaled["--rotary-seq-len-interpolation-factor"] == 4
    assert model("llama-2-7b", mtp_layers=1)["--mtp-num-layers"] == 1


def test_windows_matter_only_below_the_sequence_length() -> None:
    assert "--window-size" not in model("mistral-7b")
    assert model("mistral-7b", window=4095)["--window-size"] == "4094,0"
    assert "--window-attn-skip-freq" not in model("mistral-7b", window=1024)
    assert model("mistral-7b", window=1024, window_global_every=6)["--window-attn-skip-freq"] == 6


def test_rope_positions_reach_the_sequence_length() -> None:
    assert model("llama-2-7b", max_positions=1024)["--max-position-embeddings"] == 4096


def test_experts() -> None:
    mixtral = model("mixtral-8x7b")
    assert (mixtral["--num-experts"], mixtral["--moe-router-topk"], mixtral["--moe-ffn-hidden-size"]) == (8, 2, 14336)
    assert "--moe-layer-freq" not in mixtral
    moe = Moe(
        num_experts=8,
        top_k=2,
        expert_ffn_size=512,
        shared_ffn_size=1024,
        shared_expert_gate=True,
        first_dense_layers=2,
    )
    mixed = model("mixtral-8x7b", moe=moe, num_layers=6)
    assert mixed["--moe-layer-freq"] == "[0]*2+[1]*4"
    assert mixed["--moe-shared-expert-intermediate-size"] == 1024
    assert mixed["--moe-shared-expert-gate"] is True


def test_latent_attention() -> None:
    deepseek = model("deepseek-v3")
    names = ("q-lora-rank", "kv-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim", "v-head-dim")
    assert [deepseek[f"--{name}"] for name in names] == [1536, 512, 128, 64, 128]
    assert (deepseek["--rope-type"], deepseek["--rotary-scaling-factor"]) == ("yarn", 40.0)
    assert "--group-query-attention" not in deepseek
    small = Mla(q_lora_rank=None, kv_lora_rank=512, qk_nope_dim=128, qk_rope_dim=64, v_dim=128)
    plain = model("deepseek-v3", rope_scaling=None, mla=small)
    assert plain["--rope-type"] == "rope"
    assert plain["--no-rope-fusion"] is True
    assert "--no-rope-fusion" not in deepseek
    assert "--q-lora-rank" not in plain


@given(vocab=st.integers(1, 300_000), tp=st.sampled_from([1, 2, 4, 8, 16]))
def test_the_padded_vocabulary_is_the_least_that_splits(vocab: int, tp: int) -> None:
    rows = padded_vocabulary(vocab, tp)
    assert rows % (128 * tp) == 0
    assert 0 <= rows - vocab < 128 * tp


def read_back(document: dict[str, Any], world_size: int, num_layers: int) -> dict[str, Any]:
    """The parallel settings that Megatron's rules give these arguments."""
    found = document["MODEL_ARGS"]
    tp, pp = found["--tensor-model-parallel-size"], found["--pipeline-model-parallel-size"]
    cp = found.get("--context-parallel-size", 1)
    dp = world_size // (tp * pp * cp)
    if "--pipeline-model-parallel-layout" in found:
        blocks = [stage.count("t") for stage in expand(found["--pipeline-model-parallel-layout"])]
    else:
        first = found.get("--decoder-first-pipeline-num-layers")
        last = found.get("--decoder-last-pipeline-num-layers")
        free = pp - (first is not None) - (last is not None)
        left = num_layers - (first or 0) - (last or 0)
        assert left == 0 if free == 0 else left % free == 0
        blocks = [first] * (first is not None) + [left // max(free, 1)] * free + [last] * (last is not None)
    zero = 0
    if found.get("--use-distributed-optimizer"):
        strategy = found.get("--data-parallel-sharding-strategy") if found.get("--use-megatron-fsdp") else "optim"
        zero = ["no_shard", "optim", "optim_grads", "optim_grads_params"].index(strategy)
    granularity, depth = found.get("--recompute-granularity"), found.get("--recompute-num-layers")
    full = [0] * pp
    if granularity == "full":
        full = blocks if found["--recompute-method"] == "uniform" else [min(depth, count) for count in blocks]
    return {
        "grid": (tp, cp, dp, zero, bool(found.get("--sequence-parallel"))),
        "blocks": blocks,
        "full": full,
        "micro_batch": found["--micro-batch-size"],
        "microbatches": found["--global-batch-size"] // (found["--micro-batch-size"] * dp),
    }


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Any plan Megatron can run, by its settings."""
    blocks = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any))
    tp, cp, dp = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
    zeros = [0] if dp * cp == 1 else [0, 1] if len(blocks) > 1 else [0, 1, 2, 3]
    depth = draw(st.integers(0, 6))
    return {
        "grid": (tp, cp, dp, draw(st.sampled_from(zeros)), tp > 1),
        "blocks": blocks,
        "full": [min(depth, count) for count in blocks],
        "micro_batch": draw(st.integers(1, 4)),
        "microbatches": draw(st.integers(1, 16)),
    }


@settings(deadline=None)
@given(plans())
def test_arguments_read_back_as_the_plan(settings_of_plan: dict[str, Any]) -> None:
    tp, cp, dp, zero, sequence_parallel = settings_of_plan["grid"]
    blocks = settings_of_plan["blocks"]
    llama = replace(LLAMA, num_layers=sum(blocks))
    microbatches = settings_of_plan["microbatches"]
    job = Job(global_batch=settings_of_plan["micro_batch"] * microbatches * dp, seq_length=4096)
    grid = Strategy(tp=tp, cp=cp, dp=dp, zero=zero, sequence_parallel=sequence_parallel)
    plan = make_plan(Target.MEGATRON, blocks, grid, job, microbatches=microbatches, full=settings_of_plan["full"])
    document = yaml.safe_load(render(plan, llama, NODE, job)["megatron_args.yaml"])
    assert read_back(document, grid.num_devices * len(blocks), llama.num_layers) == settings_of_plan


@pytest.mark.parametrize("made", megatron_launches(), ids=lambda made: made.name)
def test_launches_read_back(made: Any) -> None:
    """The plans that Megatron itself checks are what they claim to be."""
    plan, grid = made.plan, made.plan.strategies[0]
    assert grid.num_devices * plan.pp == made.cluster.num_devices
    assert sum(stage.num_blocks for stage in plan.stages) == made.model.num_layers
