"""Reading config.json: what each family's keys mean, where sources are found, and errors a person can act on."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniap_tune.adapters import read_model as read_any_model
from uniap_tune.adapters.hf_families import FAMILIES
from uniap_tune.adapters.huggingface import parse_config, read_model, shipped_models
from uniap_tune.errors import ExitCode, InputError
from uniap_tune.spec import Model, Norm, Position, QkNorm
from uniap_tune.weights import parameter_count

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def parse(**changes: Any) -> Model:
    """The model of the small Llama with some keys changed (``...`` removes one)."""
    values = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    return parse_config(values, file="config.json", name="small")


def refused(**changes: Any) -> str:
    """The message with which the small Llama is refused when some keys are changed."""
    with pytest.raises(InputError) as caught:
        parse(**changes)
    return str(caught.value)


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


# --- where a model comes from ---


def test_file_folder_and_name_give_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    file = write(folder / "config.json", LLAMA)
    assert read_model(file) == read_model(str(folder)) == read_model(f"{folder}/")
    assert read_model(file).name == "my-model"


def test_other_file_names_and_ids_name_the_model(tmp_path: Path) -> None:
    assert read_model(write(tmp_path / "tiny.json", LLAMA)).name == "tiny"
    published = {**LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-hf"}
    assert read_model(write(tmp_path / "tiny.json", published)).name == "meta-llama/Llama-2-7b-hf"
    on_a_disk = {**LLAMA, "_name_or_path": "/scratch/user/checkpoints/step-100"}
    assert read_model(write(tmp_path / "tiny.json", on_a_disk)).name == "tiny"


def test_shipped_names_in_any_case_and_by_published_id() -> None:
    assert read_model("Llama-2-7B") == read_model("llama-2-7b") == read_model("meta-llama/Llama-2-7b-hf")
    assert list(shipped_models()) == sorted(shipped_models())


def test_a_configuration_on_disk_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama-2-7b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_model("llama-2-7b").hidden_size == 4096  # an output folder of that name is no model
    write(tmp_path / "llama-2-7b" / "config.json", LLAMA)
    assert read_model("llama-2-7b").hidden_size == 64


def test_readers_are_found_through_entry_points(tmp_path: Path) -> None:
    assert read_any_model("gpt2") == read_model("gpt2")
    assert read_any_model(write(tmp_path / "a.json", LLAMA)) == read_model(tmp_path / "a.json")
    with pytest.raises(InputError, match="no such file"):
        read_any_model("no-such-model")


def test_a_file_of_an_unknown_kind_lists_the_known_formats(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\x00")
    with pytest.raises(InputError, match=r"no reader knows this kind of file.*huggingface config\.json"):
        read_any_model(weights)


# --- sources that are no configuration ---


def message(source: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_model(source)
    assert caught.value.exit_code is ExitCode.BAD_INPUT
    assert caught.value.fix
    return str(caught.value)


def test_unknown_name_suggests_the_nearest() -> None:
    text = message("llama3-8b")
    assert "did you mean llama-3-8b" in text
    assert "config.json" in text
    assert "shipped models: " in message("zzzzzz")
    assert "no such file" in message("x" * 5000)


def test_missing_file_and_folder_without_configuration(tmp_path: Path) -> None:
    assert "no such file or folder" in message(tmp_path / "absent" / "config.json")
    assert "no config.json in this folder" in message(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "", "model_type: llama", "\ud800".encode("utf-16", "surrogatepass"), "[" * 100_000]
)
def test_not_json(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"{path}: not JSON" in message(path)


@pytest.mark.parametrize(
    ("value", "kind"), [([], "array"), ("x", "string"), (3, "number"), (None, "null"), (True, "bool")]
)
def test_json_that_is_no_object(tmp_path: Path, value: Any, kind: str) -> None:
    assert f"a JSON {kind}" in message(write(tmp_path / "config.json", value))


def test_files_too_large_to_be_configurations_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)  # sparse: reading it all would not end
    assert "larger than 4 MiB" in message(path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "config.json", LLAMA)

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert f"{path}: cannot be read; why: Permission denied" in message(path)


# --- keys ---


def test_unknown_model_type_is_named_with_the_known_ones() -> None:
    text = refused(model_type="mamba")
    assert "config.json: model_type 'mamba' is not known" in text
    assert all(family in text for family in FAMILIES)
    assert "model_type is missing" in refused(model_type=...)
    assert "model_type" in refused(model_type=["llama"])


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
)
@pytest.mark.parametrize("value", [..., None, -1, 0, True, 1.5, "64", [64], float("nan"), float("inf"), 1 << 40])
def test_bad_sizes_name_file_and_key(key: str, value: Any) -> None:
    text = refused(**{key: value})
    assert text.startswith(f"config.json: {key} ")


def test_error_messages_use_the_familys_own_key_names() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "vocab_size": 10}
    with pytest.raises(InputError, match=r"^config\.json: n_head is missing"):
        parse_config(gpt2, file="config.json", name="x")
    with pytest.raises(InputError, match=r"^config\.json: num_attention_heads must be"):
        parse_config({**gpt2, "num_attention_heads": -2}, file="config.json", name="x")


def test_heads_must_divide_hidden_unless_the_head_size_is_given() -> None:
    assert "hidden_size (60) is not a multiple of num_attention_heads (8)" in refused(hidden_size=60)
    assert parse(hidden_size=60, head_dim=8).head_dim == 8


def test_key_value_heads_must_divide_heads() -> None:
    text = refused(num_key_value_heads=3)
    assert "config.json: num_attention_heads (8) is not a multiple of num_key_value_heads (3)" in text
    assert parse(num_key_value_heads=None).num_kv_heads == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", -1.0),
        ("rope_theta", float("nan")),
        ("rope_theta", 10**400),
        ("hidden_act", 3),
        ("rope_scaling", [8.0]),
        ("rope_scaling", {"rope_type": "llama3", "factor": "8"}),
        ("max_position_embeddings", -5),
        ("num_hidden_layers", 10**6),
    ],
)
def test_other_malformed_values_are_refused(key: str, value: Any) -> None:
    text = refused(**{key: value})
    assert text.startswith(f"config.json: {key}")
    assert len(text) < 300


def test_nothing_of_the_file_is_executed_or_followed() -> None:
    model = parse(auto_map={"AutoConfig": "evil.Config"}, trust_remote_code=True, _class_name="os.system")
    assert model == parse()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize(
    "name", ["gpt2", "falcon-40b", "gemma-3-27b", "llama-4-maverick", "deepseek-v3", "qwen3-30b-a3b"]
)
def test_damaged_configurations_are_refused_or_read_but_never_crash(name: str) -> None:
    values = json.loads((files("uniap_tune.data") / "models" / f"{name}.json").read_text())
    extra = ["layer_types", "no_rope_layers", "moe_layers", "rope_parameters", "n_inner", "num_key_value_heads"]

    @settings(max_examples=100, database=None)
    @given(damage=st.dictionaries(st.sampled_from([*values, *extra]), JSON, min_size=1, max_size=3))
    def check(damage: dict[str, Any]) -> None:
        try:
            outcome = (
                f"config.json: {parameter_count(parse_config({**values, **damage}, file='config.json', name=name))}"
            )
        except InputError as error:
            outcome = error.what
        assert outcome.startswith("config.json: ")

    check()


# --- what families mean ---


def test_rotary_scaling_in_both_spellings() -> None:
    earlier = parse(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 8})
    present = parse(rope_parameters={"rope_type": "linear", "factor": 8, "rope_theta": 5e5})
    assert earlier == present
    assert (present.rope_theta, present.rope_scaling, present.rope_scaling_factor) == (5e5, "linear", 8.0)
    assert parse(rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert parse(model_type="phi3", partial_rotary_factor=0.75).rope_fraction == 0.75


def test_rotary_parameters_of_global_layers() -> None:
    by_kind = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    model = parse(model_type="gemma3_text", rope_parameters=by_kind)
    assert (model.rope_theta, model.rope_scaling, model.rope_scaling_factor) == (1e6, "linear", 8.0)


@pytest.mark.parametrize(("outer", "inner"), [("gemma3", "gemma3_text"), ("llama4", "llama4_text")])
def test_text_model_of_a_multimodal_configuration(outer: str, inner: str) -> None:
    text = {**LLAMA, "model_type": inner}
    alone = parse_config(text, file="f", name="n")
    nested = {"model_type": outer, "text_config": text, "vision_config": {"hidden_size": 9}}
    assert parse_config(nested, file="f", name="n") == alone
    assert alone.family == inner
    del text["model_type"]  # some published files name the family on the outside only
    assert parse_config(nested, file="f", name="n") == alone
    with pytest.raises(InputError, match="text_config is missing"):
        parse_config({"model_type": outer}, file="f", name="n")
    del text["hidden_size"]
    with pytest.raises(InputError, match="f: text_config: hidden_size is missing"):
        parse_config(nested, file="f", name="n")


def test_gemma_3_leaves_sizes_to_their_defaults() -> None:
    # google/gemma-3-4b-pt has no more sizes than these
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    model = parse_config({"model_type": "gemma3", "text_config": text}, file="f", name="gemma-3-4b")
    assert parameter_count(model) == 3_880_263_168
    assert (model.window, model.window_global_every) == (1024, 6)


def test_windows() -> None:
    assert (read_model("gemma-2-9b").window, read_model("gemma-2-9b").window_global_every) == (4096, 2)
    assert (read_model("mistral-7b").window, read_model("mistral-7b").window_global_every) == (4096, 0)
    assert read_model("qwen2.5-7b").window is None
    assert parse(model_type="mistral", sliding_window=None).window is None
    qwen = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}
    assert parse(**qwen, max_window_layers=0).window == 16
    assert parse(**qwen, max_window_layers=3).window is None
    assert "must be every N-th one" in refused(**qwen, max_window_layers=2)


def test_layer_types_override_the_default_pattern() -> None:
    local, whole = "sliding_attention", "full_attention"
    model = parse(model_type="gemma2", num_hidden_layers=6, layer_types=[local, local, whole] * 2)
    assert model.window_global_every == 3
    assert parse(model_type="gemma2", layer_types=[whole] * 3).window is None
    assert parse(model_type="gemma2", layer_types=[local] * 3).window_global_every == 0
    assert "layer_types must be a list of num_hidden_layers (3)" in refused(model_type="gemma2", layer_types=[local])
    assert "layers 0, 1 (from 0)" in refused(model_type="gemma2", layer_types=[whole, whole, local])


def test_gemma_2_soft_caps() -> None:
    model = read_model("gemma-2-27b")
    assert (model.attention_softcap, model.logit_softcap) == (50.0, 30.0)
    assert (model.norm, model.norms_per_layer) == (Norm.RMSNORM_1P, 4)
    assert parse(model_type="gemma2", attn_logit_softcapping=None).attention_softcap is None


def test_positions() -> None:
    gpt2 = read_model("gpt2")
    assert (gpt2.position, gpt2.max_positions, gpt2.position_rows) == (Position.LEARNED, 1024, 1024)
    opt = read_model("opt-13b")
    assert (opt.position, opt.max_positions, opt.position_rows) == (Position.LEARNED, 2048, 2050)
    bloom = read_model("bloom-176b")
    assert (bloom.position, bloom.max_positions) == (Position.ALIBI, None)
    falcon = {"model_type": "falcon", "alibi": True}
    assert (parse(**falcon).position, parse(**falcon).max_positions) == (Position.ALIBI, None)
    assert read_model("pythia-12b").rope_fraction == 0.25


def test_falcon_attention_variants() -> None:
    assert read_model("falcon-7b").num_kv_heads == 1
    assert read_model("falcon-40b").num_kv_heads == 8
    assert parse(model_type="falcon", multi_query=False, num_kv_heads=2).num_kv_heads == 8
    assert read_model("falcon-7b").norms_per_layer == 1
    assert read_model("falcon-40b").norms_per_layer == 2
    assert parse(model_type="falcon", parallel_attn=False).norms_per_layer == 2
    # falcon-11b: one norm in spite of the new architecture
    falcon2 = parse(model_type="falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)
    assert falcon2.norms_per_layer == 1


def test_query_key_norms() -> None:
    assert read_model("qwen3-8b").qk_norm is QkNorm.PER_HEAD
    assert read_model("llama-4-scout").qk_norm is QkNorm.L2
    assert read_model("llama-4-maverick").qk_norm is QkNorm.NONE


def test_expert_layers() -> None:
    scout, maverick, deepseek = (read_model(name).moe for name in ("llama-4-scout", "llama-4-maverick", "deepseek-v3"))
    assert scout is not None
    assert maverick is not None
    assert deepseek is not None
    assert (scout.first_dense_layers, scout.layer_frequency, scout.layer_offset) == (0, 1, 0)
    assert (maverick.first_dense_layers, maverick.layer_frequency, maverick.layer_offset) == (0, 2, 1)
    assert (deepseek.first_dense_layers, deepseek.layer_frequency) == (3, 1)
    assert deepseek.shared_ffn_size == 2048
    assert parse(model_type="llama4_text", moe_layers=[]).moe is None


@pytest.mark.parametrize("layers", [[0, 1], [0, 2, 1], [-1], ["a"], [2, 2], [7]])
def test_expert_layers_of_no_known_pattern_are_refused(layers: list[Any]) -> None:
    text = refused(model_type="llama4_text", num_hidden_layers=4, moe_layers=layers)
    assert "moe_layers" in text


def test_layers_without_rotary_positions_need_an_entry_each() -> None:
    assert "no_rope_layers must be a list of num_hidden_layers (3)" in refused(
        model_type="llama4_text", no_rope_layers=[1, 0]
    )
    model = parse(model_type="llama4_text", no_rope_layers=[1, 1, 0], attention_chunk_size=16)
    assert (model.window, model.window_global_every) == (16, 3)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gpt2", "activation_function"),
        ("opt", "activation_function"),
        ("falcon", "activation"),
        ("llama", "hidden_act"),
    ],
)
def test_activation_key_of_each_family(family: str, key: str) -> None:
    sizes = {"ffn_dim": 128, "n_embd": 64}
    assert parse(model_type=family, **sizes, **{key: "quick_gelu"}).activation == "quick_gelu"


def test_architectures_that_are_not_modelled_are_refused_by_name() -> None:
    assert "add_cross_attention" in refused(model_type="gpt2", add_cross_attention=True)
    assert "layer_norm_elementwise_affine" in refused(model_type="opt", ffn_dim=8, layer_norm_elementwise_affine=False)


def test_opt_350m_projects_its_embeddings_and_ends_without_a_norm() -> None:
    model = parse(model_type="opt", ffn_dim=128, word_embed_proj_dim=32, do_layer_norm_before=False)
    assert (model.embedding_size, model.final_norm) == (32, False)
    assert parse(model_type="opt", ffn_dim=128, word_embed_proj_dim=64).embedding_size is None


def test_gemma_gelu_means_its_tanh_approximation() -> None:
    assert parse(model_type="gemma", hidden_act="gelu", hidden_activation=None).activation == "gelu_pytorch_tanh"
    assert parse(model_type="gemma", num_attention_heads=16, num_key_value_heads=...).num_kv_heads == 16
