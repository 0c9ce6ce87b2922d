"""The tables of arguments, and that nothing is rendered that a version does not know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.launches import Launch, launch, megatron_launches
from uniap_tune.adapters.megatron_flags import RELEVANT
from uniap_tune.adapters.recipes import read_recipe
from uniap_tune.cli import main
from uniap_tune.errors import UnsupportedError
from uniap_tune.megatron.versions import DEFAULT_VERSION, VERSIONS, megatron_version, versions_with
from uniap_tune.render import megatron, render
from uniap_tune.render.megatron import megatron_launch
from uniap_tune.tuning import unknown_arguments

# Of Megatron-LM before 0.16, of forks: read where a recipe has them.
OLD = {"layernorm-epsilon", "use-custom-fsdp"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_table_says_where_it_comes_from(version: str) -> None:
    table = megatron_version(version)
    assert table.release.startswith("0.")
    assert "Megatron-LM" in table.source or "megatron-core" in table.source
    assert all(name == name.strip("-") and " " not in name for name in table.arguments)


def test_versions_grow() -> None:
    sizes = [len(megatron_version(version).arguments) for version in VERSIONS]
    assert sizes == sorted(sizes) == [680, 845, 876]
    assert versions_with("tensor-model-parallel-size") == VERSIONS
    assert versions_with("use-legacy-models") == ("0.16",)
    assert versions_with("megatron-fsdp-version") == ("head",)
    assert versions_with("no-such-argument") == ()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_recipes_are_read_for_is_known(version: str) -> None:
    assert RELEVANT - megatron_version(version).arguments == OLD


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("made", megatron_launches(), ids=lambda made: made.name)
def test_only_known_arguments_are_rendered(made: Launch, version: str) -> None:
    files = render(made.plan, made.model, made.cluster, made.job, megatron_version=version)
    document = yaml.safe_load(files["megatron_args.yaml"])
    assert {name.removeprefix("--") for name in document["MODEL_ARGS"]} <= megatron_version(version).arguments


def test_an_unknown_argument_names_the_versions_that_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = launch("llama-2-7b", "1x8:a100-80gb", [15, 17], {"tp": 2, "dp": 2})
    whole = megatron_version("0.16")
    lacking = replace(whole, arguments=whole.arguments - {"decoder-first-pipeline-num-layers"})
    monkeypatch.setattr(megatron, "megatron_version", {"0.16": lacking}.__getitem__)
    with pytest.raises(UnsupportedError) as caught:
        megatron_launch(made.plan, made.model, made.cluster, made.job, "0.16")
    assert "0.16" in caught.value.what
    assert "--decoder-first-pipeline-num-layers" in caught.value.what
    assert "--megatron-version 0.19" in caught.value.fix


@pytest.mark.parametrize(("version", "told"), [("0.16", 31999), ("0.19", 32000), ("head", 32000)])
def test_the_null_tokenizer_has_the_models_vocabulary(version: str, told: int) -> None:
    made = launch("llama-2-7b", "1x8:a100-80gb", [32], {"dp": 8})
    files = render(made.plan, made.model, made.cluster, made.job, megatron_version=version)
    assert yaml.safe_load(files["megatron_args.yaml"])["MODEL_ARGS"]["--vocab-size"] == told
    assert f"--vocab-size {told}" in files["launch.sh"]


def test_a_recipes_own_arguments_are_kept_and_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "list.txt"
    words = "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --micro-batch-size 1\n"
    words += "--global-batch-size 8 --vocab-size 1000 --bf16 --use-legacy-models --our-own-loss 3\n"
    recipe.write_text(words, encoding="utf-8")
    found = read_recipe(str(recipe))
    own, legacy = f"--our-own-loss ({recipe}:2)", f"--use-legacy-models ({recipe}:2)"
    assert unknown_arguments(found, DEFAULT_VERSION) == [legacy, own]
    assert unknown_arguments(found, "0.16") == [own]
    command = ["tune", str(recipe), "--cluster", "1x2:a100-80gb", "-o", str(tmp_path / "out")]
    assert main([*command, "--megatron-version", "0.16"]) == 0
    said = capsys.readouterr().out
    assert f"Megatron-LM 0.16 does not know {own}" in said
    assert "--our-own-loss 3" in (tmp_path / "out" / "list.txt").read_text(encoding="utf-8")


def test_an_unknown_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "gpt2", "--cluster", "1x1:a100", "--global-batch", "1", "--seq-length", "128"]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--megatron-version", "0.1"])
    assert caught.value.code == 2
    assert "0.16" in capsys.readouterr().err
