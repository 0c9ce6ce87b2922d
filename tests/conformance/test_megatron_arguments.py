"""Rendered arguments against Megatron's own: parsing, validation, configuration, the split, and the built model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launches import Launch, megatron_launches
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import read_model
from uniap_tune.graph import block_type, build_graph
from uniap_tune.planner import plan as best_plan
from uniap_tune.render.megatron_model import padded_vocabulary
from uniap_tune.space import parse_knobs
from uniap_tune.spec import Job, Norm, QkNorm, Recompute
from uniap_tune.strategy import Target
from uniap_tune.weights import rank_parameters, rank_shared_parameters

# The last release; from 0.17 on the wheel holds megatron.training, but wants Python 3.12 to be installed.
VERSION = "0.19.2"
CHECK = Path(__file__).with_name("megatron_check.py")
LAUNCHES = megatron_launches()
# model, cluster, global batch, sequence length, --fix
PLANNED: list[tuple[str, str, int, int, list[str]]] = [
    ("llama-2-7b", "1x8:a100-80gb", 128, 4096, []),
    ("llama-2-7b", "1x8:a100-40gb", 128, 4096, []),
    ("llama-2-13b", "1x8:a100-40gb", 64, 4096, ["pp=2"]),
    ("llama-3-70b", "8x8:h100", 128, 8192, []),
    ("gpt-3-175b", "16x8:a100-80gb", 1536, 2048, []),
    ("qwen3-32b", "4x8:h100", 256, 4096, ["pp=4"]),
    ("gpt2-xl", "1x4:l4", 32, 1024, []),
    ("mistral-7b", "1x8:h100", 64, 8192, ["zero=3"]),
    ("llama-3-70b", "8x8:h100", 128, 8192, ["vpp=5", "tp=4"]),
    ("llama-3-70b", "4x8:h100", 64, 8192, ["recompute=full", "pp=4"]),
    ("llama-3-70b", "8x8:h100", 128, 8192, ["tp=4", "cp=1", "pp=4", "vpp=5"]),  # the first N layers of each chunk
    ("gpt-22b", "8x8:a100-80gb", 256, 2048, ["vpp=3"]),
    ("mixtral-8x7b", "8x8:h100", 256, 4096, []),
    ("mixtral-8x7b", "4x8:h100", 128, 4096, ["ep=4", "pp=4"]),
    ("qwen3-30b-a3b", "4x8:h100", 256, 4096, ["tp=2", "ep=8"]),
]
# an argument Megatron does not know, and a pipeline that does not divide the layers
BROKEN = [["--no-such-argument"], ["--pipeline-model-parallel-size", "5"]]
CAPABILITY = {"volta": 7, "ampere": 8, "ada": 8, "hopper": 9, "blackwell": 10}


@pytest.fixture(scope="session")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``megatron.training``: UNIAP_TUNE_MEGATRON, or the unpacked wheel."""
    pytest.importorskip("torch")
    given = os.environ.get("UNIAP_TUNE_MEGATRON")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("megatron")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", f"megatron-core=={VERSION}", "--dest", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"megatron-core {VERSION} cannot be downloaded")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def case(launch: Launch) -> dict[str, Any]:
    """What ``megatron_check.py`` reads."""
    document = yaml.safe_load(launch.files()["megatron_args.yaml"])
    argv = []
    for name, value in document["MODEL_ARGS"].items():
        argv += [name] if value is True else [name, str(value)]
    # without TransformerEngine there are no zero-centred norms, and no latent attention
    buildable = launch.model.norm is not Norm.LAYERNORM_1P and launch.model.mla is None
    return {
        "argv": argv,
        "environment": document["ENV_VARS"],
        "world_size": launch.cluster.num_devices,
        "generation": CAPABILITY.get(launch.cluster.device.generation, 8),
        "build": sorted({0, min(1, launch.plan.pp - 1), launch.plan.pp - 1}) if buildable else [],
    }


@cache
def planned() -> list[Launch]:
    """The planner's own plans."""
    launches = []
    for name, cluster, global_batch, seq_length, fixed in PLANNED:
        model, machines = read_model(name), read_cluster(cluster)
        job = Job(global_batch=global_batch, seq_length=seq_length)
        plan = best_plan(model, machines, job, target=Target.MEGATRON, knobs=parse_knobs(fixed, [], []))
        launches.append(Launch(f"planned-{name}", model, machines, job, plan))
    return launches


def ask(megatron: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Megatron's answers."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(CHECK), str(megatron)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="session")
def answers(megatron: Path) -> list[dict[str, Any]]:
    """What Megatron makes of each launch, of what the planner finds, and of broken arguments."""
    cases = [case(launch) for launch in [*LAUNCHES, *planned()]]
    first = cases[0]
    return ask(megatron, [*cases, *(first | {"argv": first["argv"] + extra} for extra in BROKEN)])


@pytest.fixture(params=range(len(LAUNCHES)), ids=[launch.name for launch in LAUNCHES])
def pair(request: pytest.FixtureRequest, answers: list[dict[str, Any]]) -> tuple[Launch, dict[str, Any]]:
    """A launch and what Megatron makes of it."""
    answer = answers[request.param]
    assert "error" not in answer, answer["error"]
    return LAUNCHES[request.param], answer


def test_megatron_understands_the_plan(pair: tuple[Launch, dict[str, Any]]) -> None:
    launch, got = pair
    plan, grid = launch.plan, launch.plan.strategies[0]
    assert got["chunk_layers"] == list(map(len, plan.virtual_stage_blocks()))
    assert got["tensor_model_parallel_size"] == grid.tp
    assert got["context_parallel_size"] == grid.cp
    assert got["data_parallel_size"] == grid.dp
    assert got["sequence_parallel"] == grid.sequence_parallel
    if launch.model.moe is not None:
        assert (got["expert_model_parallel_size"], got["expert_tensor_parallel_size"]) == (grid.ep, grid.etp)
    assert got["global_batch_size"] == got["micro_batch_size"] * plan.num_microbatches * grid.dp
    assert got["use_distributed_optimizer"] == (grid.zero > 0)
    assert got["use_megatron_fsdp"] == (grid.zero > 1)
    assert got["overlap_param_gather"] == (grid.zero > 0)
    assert got["overlap_grad_reduce"] == (grid.dp * grid.cp > 1)
    if grid.zero > 1:
        assert got["data_parallel_sharding_strategy"] == {2: "optim_grads", 3: "optim_grads_params"}[grid.zero]


def test_megatron_recomputes_what_the_plan_says(pair: tuple[Launch, dict[str, Any]]) -> None:
    assert_same_recomputation(*pair)


def assert_same_recomputation(launch: Launch, got: dict[str, Any]) -> None:
    """Megatron recomputes the layers that the plan says."""
    depth, method = got["recompute_num_layers"], got["recompute_method"]
    for chunk in launch.plan.virtual_stage_blocks():
        modes = [s.recompute for s in chunk]
        if got["recompute_granularity"] is None:
            expected = [Recompute.NONE] * len(modes)
        elif got["recompute_granularity"] == "selective":
            expected = [Recompute.SELECTIVE] * len(modes)
        elif method == "uniform":  # chunks of num_layers, all recomputed; a chunk of one keeps each layer's input
            assert depth == 1
            expected = [Recompute.FULL] * len(modes)
        else:
            expected = [Recompute.FULL if i < depth else Recompute.NONE for i in range(len(modes))]
        assert modes == expected


def test_megatron_trains_the_model(pair: tuple[Launch, dict[str, Any]]) -> None:
    launch, got = pair
    model = launch.model
    expected = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim if model.mla is None else model.hidden_size // model.num_heads,
        "normalization": "LayerNorm" if model.norm in (Norm.LAYERNORM, Norm.LAYERNORM_1P) else "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "layernorm_zero_centered_gamma": model.norm is Norm.LAYERNORM_1P,
        "add_bias_linear": model.mlp_bias,
        "add_qkv_bias": model.qkv_bias,
        "gated_linear_unit": model.gated_mlp,
        # of latent attention it means the norms of the latent vectors
        "qk_layernorm": model.qk_norm is QkNorm.PER_HEAD or model.mla is not None,
        "qk_l2_norm": False,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "position_embedding_type": "learned_absolute" if model.position_rows else "rope",
        "use_rope_scaling": model.rope_scaling == "llama3",
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "mtp_num_layers": model.mtp_layers or None,
        "latent": list(astuple(model.mla)) if model.mla is not None else None,
    }
    assert {name: got[name] for name in expected} == expected
    activations = {"silu": "silu", "relu2": "squared_relu", "gelu_new": "gelu"}
    assert got["activation"] == activations[model.activation]
    if model.position_rows:
        assert got["max_position_embeddings"] == model.position_rows
    else:
        assert (got["rotary_base"], got["rotary_percent"]) == (model.rope_theta, model.rope_fraction)
    windowed = model.window is not None and model.window < launch.job.seq_length
    assert got["window_size"] == ([model.window - 1, 0] if windowed and model.window else None)


def test_megatron_trains_the_experts(pair: tuple[Launch, dict[str, Any]]) -> None:
    launch, got = pair
    moe = launch.model.moe
    if moe is None:
        assert got["num_moe_experts"] is None
        return
    assert (got["num_moe_experts"], got["moe_router_topk"]) == (moe.num_experts, moe.top_k)
    assert got["moe_ffn_hidden_size"] == moe.expert_ffn_size
    assert got["moe_shared_expert_intermediate_size"] == (moe.shared_ffn_size or None)
    frequency = got["moe_layer_freq"]
    pattern = frequency if isinstance(frequency, list) else [int(i % frequency == 0) for i in range(got["num_layers"])]
    assert pattern == [int(block_type(launch.model, i).moe) for i in range(launch.model.num_layers)]


def test_megatron_builds_the_parameters_of_each_stage(pair: tuple[Launch, dict[str, Any]]) -> None:
    launch, got = pair
    if not got["stage_parameters"]:
        pytest.skip("needs TransformerEngine")
    assert_same_parameters(launch, got)


def assert_same_parameters(launch: Launch, got: dict[str, Any]) -> None:
    """The plan's stages hold, on one rank, as many parameters as the model that Megatron builds."""
    model, grid = launch.model, launch.plan.strategies[0]
    tp = grid.tp
    padded = padded_vocabulary(model.vocab_size, tp)
    types = {layer.name: layer.type for layer in build_graph(model).layers}
    for index, parameters in got["stage_parameters"].items():
        stage = launch.plan.stages[int(index)]
        count = sum(
            rank_parameters(model, types[name], tp, ep=grid.ep, etp=grid.etp, padded_vocab=padded)
            for name in stage.layers
        )
        if {"embedding", "head"} <= set(stage.layers):
            count -= rank_shared_parameters(model, tp, padded_vocab=padded)
        assert parameters == count


def test_megatron_runs_what_the_planner_finds(answers: list[dict[str, Any]]) -> None:
    found = answers[len(LAUNCHES) : len(LAUNCHES) + len(PLANNED)]
    assert [answer.get("error") for answer in found] == [None] * len(PLANNED)
    for made, got in zip(planned(), found, strict=True):
        plan = made.plan
        assert got["chunk_layers"] == list(map(len, plan.virtual_stage_blocks()))
        assert got["data_parallel_size"] == plan.strategies[0].dp
        assert got["micro_batch_size"] * plan.num_microbatches * plan.strategies[0].dp == made.job.global_batch
        assert_same_recomputation(made, got)
        assert got["stage_parameters"]
        assert_same_parameters(made, got)


def test_the_plans_are_of_many_shapes() -> None:
    """Dense and with experts, 1B to 1T, up to 64 stages, virtual stages even and not, all axes."""
    made = [*LAUNCHES, *planned()]
    grids = [launch.plan.strategies[0] for launch in made]
    sizes = {launch.plan.pp for launch in made}
    ragged = [launch.plan for launch in made if len(set(map(len, launch.plan.virtual_stage_blocks()))) > 1]
    assert len(made) >= 60
    assert {1, 2, 4, 8, 16, 64} <= sizes
    assert sum(plan.virtual_stages > 1 for plan in ragged) >= 5
    assert sum(plan.virtual_stages == 1 for plan in ragged) >= 5
    assert sum(grid.ep > 1 for grid in grids) >= 10
    assert sum(grid.cp > 1 for grid in grids) >= 4
    modes = [{s.recompute for s in launch.plan.strategies} for launch in made if launch.plan.virtual_stages > 1]
    assert {Recompute.FULL, Recompute.NONE} in modes
    assert {grid.etp for grid in grids} >= {1, 2, 4}


def test_megatron_reports_what_it_refuses(answers: list[dict[str, Any]]) -> None:
    """The check itself can fail."""
    assert [set(answer) for answer in answers[-len(BROKEN) :]] == [{"error"}] * len(BROKEN)
