"""Every shipped model is readable, names its source, and has the parameters it is known for."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from uniap_tune.adapters.hf_families import FAMILIES
from uniap_tune.adapters.huggingface import read_model, shipped_models
from uniap_tune.weights import parameter_count

FOLDER = files("uniap_tune.data") / "models"

# parameters as published with the checkpoints
TOTALS = {
    "bloom-176b": 176_247_271_424,
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-9b": 9_241_705_984,
    "gemma-7b": 8_537_680_896,
    "gpt-neox-20b": 20_554_567_680,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "phi-3-medium": 13_960_238_080,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "pythia-12b": 11_846_072_320,
    "pythia-6.9b": 6_857_302_016,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360,
}
# billions as the papers give them (arXiv 2104.04473 table 1, 2205.05198 table 3, 2402.16819, 2406.11704, 2205.01068)
BILLIONS = {
    "gpt-7.5b": 7.5,
    "gpt-18b": 18.4,
    "gpt-39b": 39.1,
    "gpt-76b": 76.1,
    "gpt-145b": 145.6,
    "gpt-310b": 310.1,
    "gpt-530b": 529.6,
    "gpt-1t": 1008.0,
    "gpt-22b": 22.1,
    "gpt-3-175b": 174.6,
    "nemotron-4-15b": 15.6,
    "nemotron-4-340b": 341.0,
    "opt-175b": 174.6,
}

ASKED_FOR = [
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "gpt2",
    "gpt2-xl",
    "gpt-3-175b",
    "gpt-530b",
    "gpt-1t",
    "gpt-22b",
    "gpt-neox-20b",
    "opt-13b",
    "opt-66b",
    "opt-175b",
    "bloom-176b",
    "mistral-7b",
    "qwen2.5-7b",
    "qwen2.5-14b",
    "qwen2.5-32b",
    "qwen2.5-72b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-32b",
    "gemma-2-9b",
    "gemma-2-27b",
    "gemma-3-27b",
    "phi-3-mini",
    "phi-3-medium",
    "falcon-7b",
    "falcon-40b",
    "falcon-180b",
    "nemotron-4-15b",
    "nemotron-4-340b",
    "mixtral-8x7b",
    "deepseek-v3",
]


def contents(name: str) -> dict[str, Any]:
    values = json.loads((FOLDER / f"{name}.json").read_text())
    assert isinstance(values, dict)
    return values


def test_names_that_people_will_ask_for() -> None:
    assert set(ASKED_FOR) <= set(shipped_models())


def test_every_family_ships_a_model() -> None:
    assert {contents(name)["model_type"] for name in shipped_models()} == set(FAMILIES)


@pytest.mark.parametrize("name", shipped_models())
def test_file_is_well_formed(name: str) -> None:
    values = contents(name)
    assert name == name.lower()
    assert values["source"].startswith(("huggingface.co/", "arXiv "))
    model = read_model(name)
    assert model.name == name
    if "_name_or_path" in values:
        assert read_model(values["_name_or_path"]) == model


@pytest.mark.parametrize("name", TOTALS)
def test_known_totals(name: str) -> None:
    assert parameter_count(read_model(name)) == TOTALS[name]


@pytest.mark.parametrize("name", BILLIONS)
def test_totals_of_papers(name: str) -> None:
    assert round(parameter_count(read_model(name)) / 1e9, 1) == BILLIONS[name]


def test_deepseek_v3_main_model() -> None:
    # arXiv 2412.19437: 671B, and 11.5B + embedding and head of its multi-token-prediction module apart
    model = read_model("deepseek-v3")
    main = parameter_count(replace(model, mtp_layers=0))
    assert main == 671_026_404_352
    assert model.mtp_layers == 1
    assert round((parameter_count(model) - main) / 1e9, 1) == 11.6


@pytest.mark.parametrize("name", shipped_models())
def test_sizes_are_the_models_own(name: str) -> None:
    """A typing error in a size shows as a head or width that does not fit."""
    model = read_model(name)
    assert model.num_heads % model.num_kv_heads == 0
    assert model.hidden_size % 64 == 0 or name == "falcon-7b"
    assert model.norm_epsilon in {1e-5, 1e-6}
    assert model.activation
