"""Recipes: read, tuned, written back, read again; what has nothing to do with the plan stays byte for byte."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.plans import make_plan
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.recipes import ReadOptions, read_recipe
from uniap_tune.cli import main
from uniap_tune.errors import InputError
from uniap_tune.plan import Plan
from uniap_tune.planner import Request
from uniap_tune.predict import predict
from uniap_tune.recipe import Changes, Recipe, plan_run, today_run
from uniap_tune.space import Knobs
from uniap_tune.spec import Recompute
from uniap_tune.strategy import Strategy, Target
from uniap_tune.tuning import Tuning, after, changes_for, tune

RECIPES = Path(__file__).parent / "recipes"
BRIDGE = [
    "bridge/llama3_recipes.py::llama3_8b_pretrain_config",
    "bridge/llama3_recipes.py::llama3_70b_pretrain_config",
    "bridge/gpt_provider.py",
    "bridge/mixtral_kwargs.py",
]
FILES = sorted(
    str(path.relative_to(RECIPES))
    for kind in ("shell/*.sh", "model_config/*.yaml", "nemo/*.yaml", "lists/*.txt")
    for path in RECIPES.glob(kind)
    if path.name != "common_env.sh"
)
ALL = FILES + BRIDGE
CLUSTER = read_cluster("8x8:h100")
HOOK = re.compile(r'(?: \\\n *| )"\$\{TUNED_ARGS\[[@*]\](?:@Q)?\}"| \$\{TUNED_ARGS\[\*\]@Q\}')
DEVICES = CLUSTER.num_devices


def read(name: str, **options: Any) -> Recipe:
    """A recipe of the tests."""
    return read_recipe(str(RECIPES / name), ReadOptions(**options))


def plans_for(recipe: Recipe) -> list[Plan]:
    """Plans of several shapes that the recipe's job allows: even, uneven, one stage, recomputed in part and in full,
    with virtual stages of one size and not, with experts spread."""
    layers, job = recipe.model.num_layers, recipe.job
    uneven = [layers // 4 + 1, layers // 4 - 1, layers // 4, layers - 3 * (layers // 4)]
    shapes: list[tuple[list[int], dict[str, Any], list[int] | None]] = [
        ([layers], {"tp": 2, "zero": 1}, None),
        ([layers // 2, layers - layers // 2], {"tp": 4, "zero": 1}, None),
        (uneven, {"tp": 2, "cp": 2, "zero": 1}, [2] * 4),
        ([layers], {"tp": 4, "zero": 1, "recompute": Recompute.FULL}, None),
    ]
    if 3 in recipe.expressible_zero:
        shapes.append(([layers], {"tp": 1, "zero": 3}, None))
    fourths = layers // 4
    if layers % 4 == 0:
        shapes.append(([fourths] * 4, {"tp": 4, "zero": 1, "virtual": 2}, None))
    ragged = [fourths - 1, fourths + 1, fourths, layers - 3 * fourths]
    shapes.append((ragged, {"tp": 2, "zero": 1, "virtual": 2}, [1] * 4))
    if recipe.model.moe is not None:
        shapes.append(([layers], {"tp": 2, "zero": 1, "ep": 4, "etp": 1}, None))
        shapes.append(([layers], {"tp": 2, "zero": 1, "ep": 2, "etp": 2}, None))
    plans = []
    for blocks, spread, full in shapes:
        grid = {name: value for name, value in spread.items() if name != "virtual"}
        virtual = spread.get("virtual", 1)
        tp, cp = grid["tp"], grid.get("cp", 1)
        dp = DEVICES // (tp * cp * len(blocks) // virtual)
        strategy = Strategy(dp=dp, sequence_parallel=tp > 1, **grid)
        if job.global_batch % dp == 0 and recipe.model.num_heads % tp == 0:
            count = job.global_batch // dp
            if virtual > 1 and count % (len(blocks) // virtual):
                continue
            shape = {"full": full, "virtual_stages": virtual}
            plans.append(make_plan(Target.MEGATRON, blocks, strategy, job, microbatches=count, **shape))
    return plans


def rewritten(recipe: Recipe, plan: Plan) -> tuple[Changes, dict[str, str]]:
    """The changes a plan asks for, and the files with them."""
    changes = changes_for(recipe, plan, CLUSTER)
    return changes, recipe.source.rewritten(changes, CLUSTER, "1.0, inputs 123")


@pytest.mark.parametrize("name", ALL)
def test_a_plan_written_into_a_recipe_is_read_back(name: str) -> None:
    recipe = read(name)
    plans = plans_for(recipe)
    assert plans
    for plan in plans:
        changes, files = rewritten(recipe, plan)
        again = recipe.source.reread(files)
        assert changes_for(again, plan, CLUSTER).is_empty
        assert (again.model, again.job) == (recipe.model, recipe.job)
        facts = again.facts(CLUSTER)
        assert list(facts.chunks) == list(map(len, plan.virtual_stage_blocks()))
        if recipe.model.moe is not None:
            assert (facts.ep, facts.etp) == (plan.strategies[0].ep, plan.strategies[0].etp)
        assert (facts.tp, facts.cp, facts.dp) == (
            plan.strategies[0].tp,
            plan.strategies[0].cp,
            plan.strategies[0].dp,
        )
        assert facts.zero == plan.strategies[0].zero
        assert facts.micro_batch == plan.micro_batch_size
        same, priced = today_run(again, CLUSTER), plan_run(recipe, CLUSTER, plan)
        assert same.chunks == priced.chunks
        assert predict(same).step_time_s == pytest.approx(predict(priced).step_time_s, rel=1e-12)
        del changes


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(("nemo", "bridge"))])
def test_virtual_stages_do_not_batch_their_sends(name: str) -> None:
    """Megatron-LM sees to it itself; elsewhere two stages would take one message for the other."""
    recipe = read(name)
    for plan in plans_for(recipe):
        _, files = rewritten(recipe, plan)
        text = "".join(files.values()).lower()
        assert ("batch_p2p_comm: false" in text) == ("overlap_p2p_comm: true" in text) == (plan.virtual_stages > 1)
    interleaved = next(plan for plan in plans_for(recipe) if plan.virtual_stages > 1)
    again = recipe.source.reread(rewritten(recipe, interleaved)[1])
    plain = next(plan for plan in plans_for(recipe) if plan.virtual_stages == 1)
    text = "".join(rewritten(again, plain)[1].values()).lower()
    assert "batch_p2p_comm: true" in text
    assert "overlap_p2p_comm: false" in text


@pytest.mark.parametrize("name", FILES)
def test_unrelated_lines_stay_byte_for_byte(name: str) -> None:
    recipe = read(name)
    for plan in plans_for(recipe):
        changes, files = rewritten(recipe, plan)
        for file, before in recipe.source.originals().items():
            after = files[file]
            lines = list(difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True)))
            removed = [line[2:] for line in lines if line.startswith("- ")]
            added = [line[2:] for line in lines if line.startswith("+ ")]
            unhooked = HOOK.sub("", "".join(added))
            for line in removed:
                assert line in unhooked or is_related(line, changes), f"{file}: {line!r} was changed"


def is_related(line: str, changes: Changes) -> bool:
    """Whether a line is about something the plan changes."""
    words = {word for name in (*changes.values, *changes.removed) for word in (name, name.replace("-", "_"))}
    words |= set(changes.environment)
    words |= {"nodes", "NNODES", "NUM_NODES", "GPUS_PER_NODE", "nproc", "devices", "activations_checkpoint", "name:"}
    words |= {"virtual_pipeline", "micro_batch"}
    return any(word in line for word in words)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("shell/")])
def test_tuning_twice_replaces_the_first_tuning(name: str) -> None:
    recipe = read(name)
    first, second = plans_for(recipe)[:2]
    _, files = rewritten(recipe, first)
    again = recipe.source.reread(files)
    changes = changes_for(again, second, CLUSTER)
    twice = again.source.rewritten(changes, CLUSTER, "2.0, inputs 456")
    final = again.source.reread(twice)
    assert changes_for(final, second, CLUSTER).is_empty
    text = "".join(twice.values())
    assert text.count("# >>> uniap-tune") == text.count("# Tuned by uniap-tune") == text.count("TUNED_ARGS=(") == 1


def test_the_launcher_and_slurm_get_the_clusters_size() -> None:
    small = read_cluster("2x4:h100")
    recipe = read("shell/gpt3_175b.sh")
    text = recipe.source.rewritten(Changes(), small, "h")["gpt3_175b.sh"]
    assert "GPUS_PER_NODE=4\n" in text
    assert "NUM_NODES=2\n" in text
    recipe = read("shell/nemotron_slurm.sh")
    text = recipe.source.rewritten(Changes(), small, "h")["nemotron_slurm.sh"]
    for line in ("#SBATCH --nodes=2\n", "#SBATCH --gpus-per-node=4\n", "#SBATCH --ntasks-per-node=4\n"):
        assert line in text


def request(recipe: Recipe, cluster: str = "8x8:h100", **options: Any) -> Request:
    return Request(model=recipe.model, cluster=read_cluster(cluster), job=recipe.job, **options)


def tuned(name: str, cluster: str, **options: Any) -> Tuning:
    recipe = read(name)
    return tune(recipe, request(recipe, cluster, **options))


def test_today_that_does_not_fit_says_by_how_much() -> None:
    tuning = tuned("shell/gpt_uneven_layout.sh", "1x8:v100-32gb")
    assert tuning.today is not None
    assert not tuning.today.fits
    assert tuning.speedup is None
    held = tuning.today.prediction.memory_bytes_per_stage[tuning.today.worst_stage]
    limit = tuning.request.memory_limit_bytes - tuning.today.prediction.overhead_bytes
    assert tuning.today.room_bytes[tuning.today.worst_stage] == pytest.approx(limit - held)


def test_a_recipe_megatron_refuses_is_named_so() -> None:
    tuning = tuned("shell/mixtral_8x7b.sh", "2x8:h100")
    assert tuning.today is None
    assert "etp(1) * ep(8) * pp(4) does not divide 16 devices" in str(tuning.broken[0])


def test_a_better_recipe_than_the_plan_stays() -> None:
    slow = Knobs(fix={"recompute": "full", "tp": "8"})
    tuning = tuned("model_config/llama3_70b_vpp.yaml", "8x8:h100", knobs=slow)
    assert tuning.is_kept
    assert tuning.changes.is_empty


def test_the_plan_and_the_prediction_agree() -> None:
    """Search and comparison price one plan alike: the same memory, and times that differ by the schedule's model."""
    tuning = tuned("model_config/gpt_uneven_block.yaml", "2x8:a100-40gb")
    assert tuning.planning is not None
    assert tuning.tuned is not None
    plan, prediction = tuning.planning.plan, tuning.tuned.prediction
    peak = max(prediction.memory_bytes_per_stage) + prediction.overhead_bytes
    assert peak == pytest.approx(plan.peak_memory_bytes, rel=1e-9)
    assert prediction.step_time_s == pytest.approx(plan.step_time_s, rel=0.1)


def test_arguments_that_forbid_every_plan_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ramp.txt"
    text = (RECIPES / "lists/gpt_20b.txt").read_text(encoding="utf-8")
    path.write_text(text + "--rampup-batch-size 7 7 1000\n", encoding="utf-8")
    recipe = read_recipe(str(path))
    with pytest.raises(InputError, match="its other arguments forbid the plan"):
        changes_for(recipe, plans_for(recipe)[0], CLUSTER)


@pytest.mark.parametrize(
    ("first", "more", "refused"),
    [
        ("#!/bin/sh", "", True),
        ("#!/usr/bin/env dash", "", True),
        ("#!/bin/sh", "A=(1)\n", False),
        ("#!/bin/bash", "", False),
    ],
)
def test_a_script_of_sh_has_no_arrays(first: str, more: str, refused: bool, tmp_path: Path) -> None:
    lines = (RECIPES / "lists/gpt_20b.txt").read_text(encoding="utf-8").splitlines()
    arguments = " ".join(line.partition("#")[0].strip() for line in lines)
    path = tmp_path / "train.sh"
    path.write_text(f"{first}\n{more}torchrun pretrain_gpt.py {arguments}\n", encoding="utf-8")
    recipe = read_recipe(str(path))
    changes = changes_for(recipe, plans_for(recipe)[0], CLUSTER)
    if refused:
        with pytest.raises(InputError, match="need bash"):
            recipe.source.rewritten(changes, CLUSTER, "")
    else:
        assert recipe.source.rewritten(changes, CLUSTER, "")


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "shell/nemotron_slurm.sh")
    cluster = ["--cluster", "4x8:h100"]
    assert main(["tune", recipe, *cluster, "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "+# >>> uniap-tune" in out
    assert re.search(r"^today: .* a step", out, re.MULTILINE)
    assert re.search(r"^gain: \d\.\d\d times", out, re.MULTILINE)
    written = tmp_path / "nemotron_slurm.sh"
    assert main(["tune", str(written), *cluster, "-o", str(tmp_path), "--check"]) == 0
    assert main(["tune", recipe, *cluster, "-o", str(tmp_path), "--check", "--json"]) == 6
    drift = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert drift["status"] == "drift"
    assert any(line.startswith("--tensor-model-parallel-size") for line in drift["drift"])
    written.write_text(written.read_text().replace("--global-batch-size 256", "--global-batch-size 128"))
    assert main(["tune", str(written), *cluster, "-o", str(tmp_path), "--check"]) == 6
    assert "job.global_batch is 128, the plan was made for 256" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "nemo/gpt_126m.yaml"
    arguments = ["tune", str(recipe), "--cluster", "1x8:l4", "-o", str(tmp_path)]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(RECIPES / "nemo/gpt_126m.yaml"), "--cluster", "1x8:l4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["status"] == "tuned"
    assert document["today"]["fits"] is True
    assert document["speedup"] > 1
    assert document["plan"]["schema_version"] == 1
    assert document["changes"]["set"]


def test_a_job_that_cannot_fit_exits_with_three(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(RECIPES / "shell/gpt3_175b.sh"), "--cluster", "1x8:l4", "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["status"] == "infeasible"
    assert "does not fit" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shell/common_env.sh"], "starts no python training script"),
        (["bridge/llama3_recipes.py::nothing"], "has no function nothing"),
        (["nothing.sh"], "cannot be read"),
        (["README"], "not a kind of recipe"),
        (["shell/gpt3_175b.sh", "--set", "A"], "not of the form NAME=VALUE"),
        (["shell/gpt3_175b.sh", "--override", "a=1"], "--override is for Megatron-Bridge"),
        (["nemo/gpt_5b.yaml", "--execute"], "only scripts can be executed"),
        (["nemo/gpt_5b.yaml", "--check", "-o", "nowhere"], "tune the recipe with -o first"),
    ],
)
def test_wrong_use_exits_with_two(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = arguments
    assert main(["tune", str(RECIPES / name), "--cluster", "8x8:h100", *rest]) == 2
    assert words in capsys.readouterr().err


def test_the_published_settings_of_llama_3_70b_are_nearly_the_plan() -> None:
    """The comparison of docs/how-to/tune-a-recipe.md: the same grid, virtual stages, and no more than a few percent."""
    found = tuned("lists/llama3_70b_preset.txt", "8x8:h100")
    assert found.today is not None
    assert found.today.fits
    assert found.planning is not None
    plan = found.planning.plan
    grid = plan.strategies[0]
    assert (grid.tp, plan.pp, grid.cp, grid.dp, plan.micro_batch_size) == (4, 4, 2, 2, 1)
    assert plan.virtual_stages > 1
    assert {s.recompute for s in plan.strategies} == {Recompute.NONE}
    assert found.speedup == pytest.approx(1.01, abs=0.02)


def test_a_recipe_keeps_its_own_words() -> None:
    """Virtual stages by their size where it says so, and no experts' grid that is the default."""
    recipe = read("shell/mixtral_8x7b.sh")
    plans = plans_for(recipe)
    even = next(p for p in plans if p.virtual_stages > 1 and len(set(map(len, p.virtual_stage_blocks()))) == 1)
    values = changes_for(recipe, even, CLUSTER).values
    assert "num-virtual-stages-per-pipeline-rank" not in values
    assert after(recipe, changes_for(recipe, even, CLUSTER), CLUSTER).virtual == even.virtual_stages == 2
    ragged = next(p for p in plans if len(set(map(len, p.virtual_stage_blocks()))) > 1 and p.virtual_stages > 1)
    assert "num-layers-per-virtual-pipeline-stage" in changes_for(recipe, ragged, CLUSTER).removed
    split = next(p for p in plans if p.strategies[0].etp == p.strategies[0].tp == 2)
    facts = after(recipe, changes_for(recipe, split, CLUSTER), CLUSTER)
    assert (facts.ep, facts.etp) == (2, 2)
    assert "expert-tensor-parallel-size" not in facts.arguments
