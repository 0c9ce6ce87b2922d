"""What each target cannot train."""

from __future__ import annotations

from dataclasses import replace

import pytest

from uniap_tune.adapters.huggingface import read_model, shipped_models
from uniap_tune.errors import ExitCode, UnsupportedError
from uniap_tune.spec import DType, Job, Model, Norm, OptimizerName, Position, Precision, QkNorm
from uniap_tune.strategy import Target
from uniap_tune.targets import notes, require_supported, unsupported

JOB = Job(global_batch=8, seq_length=1024)
LLAMA = read_model("llama-2-7b")
GPT = read_model("gpt-3-175b")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom-176b", "ALiBi"),
        ("bloom-176b", "norm after the embedding"),
        ("falcon-40b", "parallel residual"),
        ("gpt-neox-20b", "parallel residual"),
        ("gemma-2-27b", "soft-capping of attention scores"),
        ("gemma-2-27b", "soft-capping of logits"),
        ("gemma-2-27b", "norms after attention and MLP"),
        ("gemma-7b", "gated MLP with gelu_pytorch_tanh"),
        ("opt-66b", "MLP with relu"),
        ("llama-4-scout", "chunked attention"),
    ],
)
def test_megatron_refuses_shipped_models_by_feature(name: str, reason: str) -> None:
    model = read_model(name)
    assert any(reason in given for given in unsupported(model, JOB, Target.MEGATRON))
    with pytest.raises(UnsupportedError) as caught:
        require_supported(model, JOB, Target.MEGATRON)
    assert caught.value.exit_code is ExitCode.BAD_INPUT
    assert name in caught.value.what
    assert "megatron" in caught.value.what
    assert reason in caught.value.why
    assert caught.value.fix == "use --target deepspeed or --target any"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (replace(LLAMA, qk_norm=QkNorm.FULL), "query-key norm"),
        (replace(LLAMA, embedding_size=512), "projection of the embedding"),
        (replace(LLAMA, final_norm=False), "final norm"),
        (replace(LLAMA, norms_per_layer=1), "single norm"),
        (replace(LLAMA, head_bias=True), "bias of the output layer"),
        (replace(LLAMA, qkv_bias=True, attention_out_bias=True), "biases in attention or MLP alone"),
        (replace(GPT, qkv_bias=False), "biases in attention or MLP alone"),
        (replace(GPT, norm_bias=False), "LayerNorm without a bias"),
        (replace(LLAMA, norm_bias=True), "RMSNorm with one"),
        (replace(LLAMA, rope_scaling="yarn", rope_scaling_factor=4.0), "kind yarn by 4.0"),
        (replace(LLAMA, rope_scaling="linear", rope_scaling_factor=2.5), "kind linear by 2.5"),
        (replace(LLAMA, rope_theta=10000.5), "rotary base 10000.5"),
        (replace(LLAMA, position=Position.ALIBI), "ALiBi"),
        (replace(LLAMA, causal=False), "attention to both sides"),
        (replace(LLAMA, encoder_layers=2), "an encoder before the decoder"),
    ],
)
def test_megatron_refuses_features(model: Model, reason: str) -> None:
    (given,) = unsupported(model, JOB, Target.MEGATRON)
    assert reason in given


@pytest.mark.parametrize(
    "model",
    [
        replace(LLAMA, qkv_bias=True),
        replace(LLAMA, qk_norm=QkNorm.L2),
        replace(LLAMA, rope_scaling="linear", rope_scaling_factor=4.0),
        replace(LLAMA, rope_fraction=0.5),
        replace(LLAMA, norm=Norm.RMSNORM_1P),
        replace(LLAMA, window=512),
        replace(GPT, activation="relu2"),
        replace(GPT, position=Position.NONE),
    ],
)
def test_megatron_trains_what_it_has_arguments_for(model: Model) -> None:
    assert unsupported(model, JOB, Target.MEGATRON) == ()
    require_supported(model, JOB, Target.MEGATRON)


@pytest.mark.parametrize(
    ("job", "target", "reason"),
    [
        (replace(JOB, precision=Precision(master_weights=False)), Target.MEGATRON, "without fp32 master weights"),
        (replace(JOB, precision=Precision(master_weights=False)), Target.DEEPSPEED, "without fp32 master weights"),
        (replace(JOB, optimizer_state_bytes=3), Target.MEGATRON, "adam with 3 bytes of states"),
        (
            replace(JOB, optimizer=OptimizerName.SGD, optimizer_state_bytes=8),
            Target.MEGATRON,
            "sgd with 8 bytes of states",
        ),
        (replace(JOB, precision=Precision(compute=DType.FP8)), Target.DEEPSPEED, "8-bit"),
    ],
)
def test_jobs_are_refused_too(job: Job, target: Target, reason: str) -> None:
    (given,) = unsupported(LLAMA, job, target)
    assert reason in given


def test_the_dense_families_with_megatron_recipes_are_supported() -> None:
    wanted = ("llama", "gpt-3", "gpt-5", "gpt-1t", "gpt2", "qwen", "mistral", "phi-", "nemotron", "mixtral")
    names = [name for name in shipped_models() if name.startswith(wanted) and not name.startswith("llama-4")]
    assert len(names) > 25
    for name in names:
        assert unsupported(read_model(name), JOB, Target.MEGATRON) == (), name


@pytest.mark.parametrize("name", shipped_models())
def test_the_free_space_and_deepspeed_train_every_shipped_model(name: str) -> None:
    model = read_model(name)
    assert unsupported(model, JOB, Target.ANY) == ()
    assert unsupported(model, JOB, Target.DEEPSPEED) == ()


def test_no_target_plans_an_encoder_decoder() -> None:
    with pytest.raises(UnsupportedError) as caught:
        require_supported(replace(LLAMA, encoder_layers=2), JOB, Target.ANY)
    assert caught.value.fix == "give a model without them"


def test_notes_name_what_differs() -> None:
    (note,) = notes(read_model("llama-3.2-1b"), JOB, Target.MEGATRON)
    assert "this model has 32" in note
    assert notes(read_model("llama-3.1-8b"), JOB, Target.MEGATRON) == ()
    assert len(notes(read_model("llama-3.1-8b"), JOB, Target.DEEPSPEED)) == 1
    layers, predictions = notes(read_model("deepseek-v3"), JOB, Target.DEEPSPEED)
    assert "operator by operator" in layers
    assert "multi-token" in predictions
