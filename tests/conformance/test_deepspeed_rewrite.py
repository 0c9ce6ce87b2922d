"""Whatever JSON DeepSpeed accepts, it still accepts with a plan written into it, and the diff names every change."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.launches import Launch, deepspeed_launches
from uniap_tune.adapters.deepspeed import differences, forbidden_zero, rewrite
from uniap_tune.render.deepspeed import deepspeed_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
ACCEPTS = Path(__file__).with_name("deepspeed_accepts.py")
LAUNCHES = deepspeed_launches()
EXAMPLES = 400

Ask = Callable[[Mapping[str, Any], int], str]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """What DeepSpeed has against a configuration on so many ranks; empty: nothing."""
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ACCEPTS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"

        def question(config: Mapping[str, Any], ranks: int) -> str:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps({"config": config, "ranks": ranks}) + "\n")
            child.stdin.flush()
            return child.stdout.readline().strip()

        yield question
        child.stdin.close()


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with any of these keys."""
    return st.fixed_dictionaries({}, optional=keys)


def sizes(low: int = 1) -> st.SearchStrategy[int | float]:
    """Whole numbers as people write them, 500000000 or 5e8."""
    return st.integers(low, 10**9) | st.sampled_from([5e8, 1e9, 2e8])


FLAGS = st.booleans()
OFFLOAD = some(
    device=st.sampled_from(["none", "cpu"]), pin_memory=FLAGS, ratio=st.sampled_from([1.0, 0.5]), fast_init=FLAGS
)
ZERO = some(
    stage=st.integers(0, 3),
    contiguous_gradients=FLAGS,
    reduce_scatter=FLAGS,
    reduce_bucket_size=sizes(),
    allgather_partitions=FLAGS,
    allgather_bucket_size=sizes(),
    overlap_comm=FLAGS,
    compute_grad_norm=FLAGS,
    round_robin_gradients=FLAGS,
    sub_group_size=sizes(),
    stage3_prefetch_bucket_size=sizes(0),
    stage3_param_persistence_threshold=sizes(0),
    stage3_max_live_parameters=sizes(0),
    stage3_gather_16bit_weights_on_model_save=FLAGS,
    zero_hpz_partition_size=st.integers(1, 8),
    zero_quantized_weights=FLAGS,
    zero_quantized_gradients=FLAGS,
    offload_optimizer=OFFLOAD,
    offload_param=some(device=st.sampled_from(["none", "cpu"]), pin_memory=FLAGS, max_in_cpu=sizes(0)),
    cpu_offload=FLAGS,
    cpu_offload_param=FLAGS,
    no_such_key=st.just(1),
)
USER = some(
    train_batch_size=st.integers(1, 4096),
    train_micro_batch_size_per_gpu=st.integers(1, 16),
    gradient_accumulation_steps=st.integers(1, 16),
    steps_per_print=st.integers(1, 100),
    gradient_clipping=st.sampled_from([0.0, 0.5, 1]),
    gradient_allreduce_op=st.sampled_from(["avg", "sum"]),
    prescale_gradients=FLAGS,
    communication_data_type=st.sampled_from(["fp32", "bf16"]),
    wall_clock_breakdown=FLAGS,
    optimizer=some(type=st.sampled_from(["Adam", "AdamW", "SGD"]), params=some(lr=st.just(1e-4), torch_adam=FLAGS)),
    scheduler=st.just({"type": "WarmupLR", "params": {"warmup_num_steps": 10}}),
    bf16=some(enabled=FLAGS, bf16_master_weights_and_grads=FLAGS),
    fp16=some(enabled=FLAGS, loss_scale=st.just(0), fp16_master_weights_and_grads=FLAGS),
    zero_optimization=ZERO | st.booleans(),
    tensor_parallel=some(autotp_size=st.integers(0, 8), tp_overlap_comm=FLAGS, preset_model=st.just("llama")),
    pipeline=some(activation_checkpoint_interval=st.integers(0, 2), stages=st.just("auto")),
    activation_checkpointing=some(partition_activations=FLAGS, number_checkpoints=st.none() | st.just(4)),
    data_types=some(grad_accum_dtype=st.sampled_from(["fp32", "bf16", None])),
    autotuning=some(enabled=st.just(False), uniap=st.just({"model": "gpt2"})),
    uniap=st.just({"model": "gpt2"}),
    users_own_key=st.just({"deep": [1, 2, {"deeper": None}]}),
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    derandomize=True,
)
@given(user=USER, launch=st.sampled_from(LAUNCHES), ranks=st.sampled_from([1, 2, 8]))
def test_what_deepspeed_accepts_it_still_accepts(ask: Ask, user: dict[str, Any], launch: Launch, ranks: int) -> None:
    grid = launch.plan.strategies[0]
    # Batch keys that agree with each other are rare by chance; the plan's own replace them anyway.
    if "train_batch_size" in user and len(user.keys() & {"train_micro_batch_size_per_gpu"}):
        user["train_batch_size"] = user["train_micro_batch_size_per_gpu"] * ranks
        user.pop("gradient_accumulation_steps", None)
    assume(grid.zero not in forbidden_zero(user))
    assume(not ask(user, ranks))
    before = deepcopy(user)
    after = rewrite(user, deepspeed_config(launch.plan, launch.model, launch.job))
    assert user == before
    world = launch.cluster.num_devices
    assert ask(after, world if grid.tp > 1 else grid.dp) == ""
    assert undone(after, before, {change.key for change in differences(before, after)}) == before


def undone(after: dict[str, Any], before: dict[str, Any], named: set[str]) -> dict[str, Any]:
    """``after`` with the named keys taken back: nothing else may differ."""
    result = deepcopy(after)
    for name in named:
        *path, last = name.split(".")
        here, there = result, before
        for part in path:
            here, there = here[part], there[part]
        if last in there:
            here[last] = there[last]
        else:
            del here[last]
    return result
