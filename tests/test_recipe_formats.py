"""What each format says in its own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_tune import RECIPES, read
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.recipes import ReadOptions, read_recipe
from uniap_tune.errors import InputError
from uniap_tune.planner import Request
from uniap_tune.spec import Cluster, DType, Norm, Position
from uniap_tune.tuning import tune


def test_nemo_follows_interpolations() -> None:
    recipe = read("nemo/gpt_5b.yaml")
    assert recipe.model.ffn_size == 4 * 4096
    assert recipe.model.norm is Norm.LAYERNORM_1P
    assert recipe.job.precision.compute is DType.BF16
    assert recipe.hints.num_nodes == 16
    assert recipe.arguments["use-distributed-optimizer"].where.endswith("gpt_5b.yaml:50")
    assert read("nemo/llama2_70b.yaml").facts_with({}, {}, one_node()).single_queue is False


def one_node() -> Cluster:

    return read_cluster("1x8:h100")


def test_bridge_takes_the_model_from_its_hugging_face_name() -> None:
    recipe = read("bridge/llama3_recipes.py::llama3_70b_pretrain_config")
    assert (recipe.model.num_layers, recipe.model.hidden_size, recipe.model.vocab_size) == (80, 8192, 128256)
    assert recipe.model.position is Position.ROPE
    assert recipe.arguments["num-virtual-stages-per-pipeline-rank"].value == "5"
    assert recipe.job.global_batch == 512  # of the recipe it starts from
    assert recipe.arguments["tensor-model-parallel-size"].where.endswith("llama3_recipes.py:46")


def test_bridge_overrides_win() -> None:
    name = "bridge/gpt_provider.py"
    recipe = read(name, overrides=["model.tensor_model_parallel_size=2", "++train.micro_batch_size=4"])
    assert recipe.arguments["tensor-model-parallel-size"].value == "2"
    assert recipe.arguments["micro-batch-size"].value == "4"


def test_bridge_wants_to_know_which_recipe(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text("def a():\n    return 1\n\n\ndef b():\n    return 2\n")
    with pytest.raises(InputError, match="which recipe is meant is not clear"):
        read_recipe(str(path))


def test_bridge_does_not_import(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(witness)!r}, 'w')\n\n\ndef a():\n    return open({str(witness)!r}, 'w')\n")
    with pytest.raises(InputError):
        read_recipe(str(path), ReadOptions())
    assert not witness.exists()


def test_model_config_switches_and_lists() -> None:
    recipe = read("model_config/mixtral_ep.yaml")
    assert recipe.arguments["sequence-parallel"].value is True
    assert recipe.arguments["recompute-modules"].value == "core_attn"
    assert recipe.model.moe is not None
    assert "sequence-parallel" not in read("model_config/gpt_uneven_block.yaml").arguments


def test_a_list_is_not_expanded(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text((RECIPES / "lists/gpt_20b.txt").read_text().replace("--num-layers 44", "--num-layers $N"))
    with pytest.raises(InputError, match=r"a\.txt:2: the value of --num-layers is not known"):
        read_recipe(str(path))


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ("", "model"),
        ("    cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False)\n", "comm_overlap"),
    ],
)
def test_a_bridge_recipe_overlaps_tensor_parallelism_where_it_says_such_things(
    extra: str, key: str, tmp_path: Path
) -> None:
    """Megatron-Bridge has no ``comm_overlap`` unless the recipe makes one."""
    text = (RECIPES / "bridge" / "llama3_recipes.py").read_text(encoding="utf-8")
    path = tmp_path / "recipes.py"
    path.write_text(text.rstrip().removesuffix("    return cfg") + extra + "    return cfg\n", encoding="utf-8")
    recipe = read_recipe(f"{path}::llama3_70b_pretrain_config")
    assert not recipe.runtime.overlap_tensor
    found = tune(recipe, Request(model=recipe.model, cluster=read_cluster("8x8:h100"), job=recipe.job))
    assert found.changes.values["tp-comm-overlap"] is True
    files = recipe.source.rewritten(found.changes, found.request.cluster, "")
    assert f"{key}.tp_comm_overlap=true\n" in files["llama3_70b_pretrain_config.overrides.txt"]
    assert recipe.source.reread(files).runtime.overlap_tensor
