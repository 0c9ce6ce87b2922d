"""Parts of time and memory add up to what ``predict`` says, for every way to run a model."""

from __future__ import annotations

import pytest

from tests.doctors import deepspeed, megatron, recipe
from uniap_tune.breakdown import BUBBLE, SEND, break_down
from uniap_tune.cost.parts import ACTIVATIONS, OPTIMIZER_STATES
from uniap_tune.doctor.setup import Setup
from uniap_tune.predict import predict

SETUPS: dict[str, Setup] = {
    "one stage": megatron(tp="2", zero="1"),
    "pipeline": megatron(pp="4", tp="2", zero="0", recompute="full"),
    "uneven, recomputed in part": megatron(pp="4", zero="1", layers="9,8,8,7", recompute="3"),
    "interleaved": megatron(pp="4", vpp="4", zero="1"),
    "sharded": megatron(zero="3"),
    "long": megatron("llama-3.1-8b", "2x8:h100", batch=16, seq=32768, cp="4", tp="2", zero="1"),
    "experts": recipe("shell/mixtral_8x7b.sh", "8x8:h100"),
    "one sample": megatron(batch=8, pp="8"),
    "deepspeed": deepspeed(zero="2", recompute="full"),
    "deepspeed pipeline": deepspeed(pp="4", zero="1"),
}


@pytest.mark.parametrize("name", SETUPS)
def test_parts_add_up(name: str) -> None:
    run = SETUPS[name].run()
    parts, whole = break_down(run), predict(run)
    assert parts.prediction == whole
    assert sum(parts.time.values()) == pytest.approx(whole.step_time_s, rel=1e-12)
    assert min(parts.time.values()) > 0
    assert [sum(stage.values()) for stage in parts.memory] == pytest.approx(whole.memory_bytes_per_stage, rel=1e-12)
    assert all(size > 0 for stage in parts.memory for size in stage.values())
    assert sum(parts.blocks) == run.model.num_layers
    assert len(parts.memory) == len(parts.stage_s) == run.pp


def test_only_pipelines_wait() -> None:
    single, pipeline = break_down(SETUPS["one stage"].run()), break_down(SETUPS["pipeline"].run())
    assert not {BUBBLE, SEND} & single.time.keys()
    assert {BUBBLE, SEND} <= pipeline.time.keys()
    assert 0 < pipeline.bubble < 1


def test_the_bubble_is_that_of_the_textbook() -> None:
    """(p - 1) / (m + p - 1) for equal stages without transfers (arXiv 2104.04473 section 2.1), up to embedding and
    head."""
    run = megatron(batch=32, pp="4", dp="2", zero="0").run()
    found = break_down(run)
    stages = found.stage_s
    longest, m = max(stages), run.num_microbatches
    assert found.time[BUBBLE] == pytest.approx(sum(stages) - longest, rel=1e-9)
    assert found.bubble == pytest.approx(3 / (m + 3), abs=0.03)


def test_memory_at_the_peak() -> None:
    """The first stage of 1F1B holds p micro-batches, the last one: their activations are as p to 1."""
    found = break_down(megatron(pp="4", tp="2", zero="0").run())
    first, last = found.memory[0][ACTIVATIONS], found.memory[-1][ACTIVATIONS]
    assert first == pytest.approx(4 * last, rel=0.01)
    assert found.memory[1][OPTIMIZER_STATES] == pytest.approx(found.memory[2][OPTIMIZER_STATES])


def test_mfu_counts_model_flops_only() -> None:
    plain, again = (break_down(megatron(tp="2", zero="1", recompute=mode).run()) for mode in ("none", "full"))
    assert again.mfu == pytest.approx(plain.mfu * plain.prediction.step_time_s / again.prediction.step_time_s)
    tokens = 128 * 4096
    assert plain.tokens_per_s == pytest.approx(tokens / plain.prediction.step_time_s)
    assert plain.mfu == pytest.approx(6 * 6.74e9 * plain.tokens_per_s / (8 * 312e12), rel=0.15)
