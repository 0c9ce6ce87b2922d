"""Parameter counts and defaults against the real models of ``transformers``, built on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniap_tune.adapters.hf_families import FAMILIES
from uniap_tune.adapters.huggingface import parse_config, shipped_models
from uniap_tune.spec import Model
from uniap_tune.weights import parameter_count

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.57")

pytestmark = [
    # torch imports NVIDIA's library under a name that is going away
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
    # transformers calls torch functions that are going away
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
]

Config = dict[str, Any]


def real_config(values: Config) -> Any:
    """The configuration object of ``transformers``, as ``from_pretrained`` would make it."""
    return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)


def real_parameters(values: Config) -> int:
    """Parameters of the real model; a tied matrix is one parameter, buffers are none."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(real_config(values))
    return sum(parameter.numel() for parameter in model.parameters())


def our_model(values: Config) -> Model:
    """Our reading, without multi-token prediction: ``transformers`` leaves those modules out."""
    return replace(parse_config(json.loads(json.dumps(values)), file="config.json", name="drawn"), mtp_layers=0)


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_models_have_the_real_parameter_count(name: str) -> None:
    values = json.loads((files("uniap_tune.data") / "models" / f"{name}.json").read_text())
    assert parameter_count(our_model(values)) == real_parameters(values)


HEADS = st.sampled_from([1, 2, 4, 6, 8])
HEAD_DIM = st.sampled_from([4, 6, 16])
WIDTH = st.integers(1, 60)


@st.composite
def grouped_heads(draw: st.DrawFn, *, head_dim_key: bool = True) -> Config:
    """Heads, key/value heads dividing them, a hidden size and, where the family has the key, a head size apart."""
    heads = draw(HEADS)
    config: Config = {"num_attention_heads": heads, "hidden_size": heads * draw(HEAD_DIM)}
    config["num_key_value_heads"] = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    if head_dim_key:
        config["head_dim"] = draw(HEAD_DIM)
    return config


@st.composite
def plain_heads(draw: st.DrawFn) -> Config:
    """Heads that share the hidden size evenly."""
    heads = draw(HEADS)
    return {"num_attention_heads": heads, "hidden_size": heads * draw(HEAD_DIM)}


def renamed(strategy: st.SearchStrategy[Config], **names: str) -> st.SearchStrategy[Config]:
    """The same configurations under the family's own names of keys."""
    return strategy.map(lambda config: {names.get(key, key): value for key, value in config.items()})


def options(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[Config]:
    """Keys that may be present or left to the family's default."""
    return st.fixed_dictionaries({}, optional=strategies)


FLAG = st.booleans()
SIZES = st.fixed_dictionaries(
    {"num_hidden_layers": st.integers(1, 4), "vocab_size": st.integers(8, 99), "intermediate_size": WIDTH}
)
POSITIONS = st.integers(1, 70)
WITH_BIASES = options(attention_bias=FLAG, mlp_bias=FLAG, tie_word_embeddings=FLAG)
TIED = options(tie_word_embeddings=FLAG)
LATENT = st.fixed_dictionaries(
    {
        "q_lora_rank": st.none() | WIDTH,
        "kv_lora_rank": WIDTH,
        "qk_nope_head_dim": WIDTH,
        "qk_rope_head_dim": st.sampled_from([2, 4, 8]),
        "v_head_dim": WIDTH,
        "n_routed_experts": st.integers(1, 4),
        "n_group": st.just(1),
        "topk_group": st.just(1),
        "num_experts_per_tok": st.just(1),
        "moe_intermediate_size": WIDTH,
    },
    optional={"n_shared_experts": st.integers(1, 3), "first_k_dense_replace": st.integers(0, 3)},
)
EXPERTS = options(
    num_experts=st.integers(1, 5),
    moe_intermediate_size=WIDTH,
    decoder_sparse_step=st.integers(1, 3),
    mlp_only_layers=st.sampled_from([[], [0], [0, 1]]),
)

# the parts of a random configuration of each family; later parts win
DRAWN: dict[str, tuple[st.SearchStrategy[Config], ...]] = {
    "bloom": (renamed(SIZES, num_hidden_layers="n_layer"), renamed(plain_heads(), num_attention_heads="n_head"), TIED),
    "deepseek_v3": (SIZES, plain_heads(), LATENT, options(attention_bias=FLAG, tie_word_embeddings=FLAG)),
    "falcon": (
        SIZES,
        plain_heads(),
        options(
            new_decoder_architecture=FLAG,
            multi_query=FLAG,
            parallel_attn=FLAG,
            bias=FLAG,
            alibi=FLAG,
            num_kv_heads=st.none() | st.just(1),
            num_ln_in_parallel_attn=st.sampled_from([None, 1, 2]),
            ffn_hidden_size=st.none() | WIDTH,
            tie_word_embeddings=FLAG,
        ),
    ),
    "gemma": (SIZES, grouped_heads(), WITH_BIASES),
    "gemma2": (SIZES, grouped_heads(), WITH_BIASES),
    "gemma3_text": (SIZES, grouped_heads(), WITH_BIASES, options(sliding_window_pattern=st.integers(1, 4))),
    "gpt2": (
        renamed(SIZES, num_hidden_layers="n_layer"),
        renamed(plain_heads(), num_attention_heads="n_head", hidden_size="n_embd"),
        options(n_inner=st.none() | WIDTH, n_positions=POSITIONS, tie_word_embeddings=FLAG),
    ),
    "gpt_neox": (SIZES, plain_heads(), options(use_parallel_residual=FLAG), WITH_BIASES),
    "llama": (SIZES, grouped_heads(head_dim_key=False) | grouped_heads(), WITH_BIASES),
    "llama4_text": (
        SIZES,
        grouped_heads(),
        options(
            intermediate_size_mlp=WIDTH,
            num_local_experts=st.integers(1, 4),
            moe_layers=st.sampled_from([None, []]),
            interleave_moe_layer_step=st.integers(1, 3),
            no_rope_layer_interval=st.integers(1, 3),
            use_qk_norm=FLAG,
            attention_bias=FLAG,
            tie_word_embeddings=FLAG,
        ),
    ),
    "mistral": (SIZES, grouped_heads(head_dim_key=False) | grouped_heads(), TIED),
    "mixtral": (SIZES, grouped_heads(), TIED, options(num_local_experts=st.integers(2, 5))),
    "nemotron": (SIZES, grouped_heads(), WITH_BIASES),
    "opt": (
        renamed(SIZES, intermediate_size="ffn_dim"),
        plain_heads(),
        options(
            max_position_embeddings=POSITIONS,
            word_embed_proj_dim=WIDTH,
            do_layer_norm_before=FLAG,
            _remove_final_layer_norm=FLAG,
            enable_bias=FLAG,
            tie_word_embeddings=FLAG,
        ),
    ),
    "phi3": (SIZES, grouped_heads(head_dim_key=False), TIED),
    "qwen2": (SIZES, grouped_heads(head_dim_key=False), TIED),
    "qwen3": (SIZES, grouped_heads(), options(attention_bias=FLAG, tie_word_embeddings=FLAG)),
    "qwen3_moe": (SIZES, grouped_heads(), EXPERTS, options(attention_bias=FLAG, tie_word_embeddings=FLAG)),
}


def test_every_family_is_drawn() -> None:
    assert DRAWN.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", DRAWN)
def test_random_variants_have_the_real_parameter_count(family: str) -> None:
    @settings(max_examples=30, deadline=None, database=None)
    @given(parts=st.tuples(*DRAWN[family]))
    def check(parts: tuple[Config, ...]) -> None:
        # pad_token_id must lie inside the vocabulary, which is far smaller here than any default of it
        values: Config = {"model_type": family, "pad_token_id": 0}
        for part in parts:
            values.update(part)
        assert parameter_count(our_model(values)) == real_parameters(values)

    check()


# facts that both sides know: field of Model -> how transformers' configuration says it
SAME_FACTS: dict[str, Callable[[Any], Any]] = {
    "num_layers": lambda c: c.num_hidden_layers,
    "hidden_size": lambda c: c.hidden_size,
    "num_heads": lambda c: c.num_attention_heads,
    "vocab_size": lambda c: c.vocab_size,
    "tied_embeddings": lambda c: c.tie_word_embeddings,
}
# facts that only some families' configurations have under one of these names
NAMED_FACTS: dict[str, tuple[str, ...]] = {
    "norm_epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "activation": ("hidden_act", "hidden_activation", "activation_function", "activation"),
    "attention_dropout": ("attention_dropout", "attn_pdrop"),
    "hidden_dropout": ("hidden_dropout", "resid_pdrop", "dropout"),
    "max_positions": ("max_position_embeddings",),
    "attention_softcap": ("attn_logit_softcapping",),
    "logit_softcap": ("final_logit_softcapping",),
}
REQUIRED: Config = {
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "num_attention_heads": 32,
    "vocab_size": 100,
    "intermediate_size": 512,
    "ffn_dim": 512,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_they_mean_to_transformers(family: str) -> None:
    values = {**REQUIRED, "model_type": family}
    if family == "nemotron":  # transformers cannot build the model without the key
        values["num_key_value_heads"] = 8
    config = real_config(values)
    model = our_model(values)
    for field, get in SAME_FACTS.items():
        assert getattr(model, field) == get(config), field
    for field, names in NAMED_FACTS.items():
        found = [getattr(config, name) for name in names if hasattr(config, name)]
        if found:
            assert getattr(model, field) == found[0], field
    assert parameter_count(model) == real_parameters({**values, "pad_token_id": 0})


@pytest.mark.parametrize("family", FAMILIES)
def test_default_rotary_positions_and_windows_are_those_of_transformers(family: str) -> None:
    values = {**REQUIRED, "model_type": family}
    config = real_config(values)
    model = our_model(values)
    rope = getattr(config, "rope_parameters", None)
    if rope is not None:
        rope = rope.get("full_attention", rope)
        assert model.rope_theta == rope["rope_theta"]
        assert model.rope_fraction == rope.get("partial_rotary_factor", 1.0)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        every = model.window_global_every
        ours = [
            "full_attention" if model.window is None or (every and (i + 1) % every == 0) else "local"
            for i in range(model.num_layers)
        ]
        assert ours == [kind if kind == "full_attention" else "local" for kind in kinds]
