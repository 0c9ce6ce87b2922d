"""Rendered configurations train a tiny GPTModel of the installed megatron-core, with the losses of one process.

Not on a CPU: sequence parallelism (it needs Apex or TransformerEngine), context parallelism, FP8 and Megatron-FSDP.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.counting import counting_costs, link_bytes
from tests.plans import make_plan
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import parse_config
from uniap_tune.graph import build_graph
from uniap_tune.render import render
from uniap_tune.spec import DType, Job, Precision
from uniap_tune.strategy import Strategy, Target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
]
SCRIPT = Path(__file__).with_name("megatron_train.py")
SECONDS = 600
BATCH, LENGTH, STEPS = 8, 16, 2
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """A plan for a tiny model. ``blocks``: layers of each stage or virtual stage."""

    name: str
    blocks: list[int]
    strategy: Strategy
    virtual_stages: int = 1
    full: list[int] | None = None
    experts: bool = False
    tied: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The model."""
        return LLAMA | (MIXTRAL if self.experts else {}) | {"tie_word_embeddings": self.tied}

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.blocks) // self.virtual_stages


CASES = [
    Case("tensor", [6], Strategy(tp=2, dp=2, zero=1)),
    Case("uneven", [4, 2], Strategy(dp=2, zero=1)),
    Case("layout", [1, 2, 3, 0], Strategy()),
    Case("both", [2, 4], Strategy(tp=2)),
    Case("tied", [3, 3], Strategy(dp=2, zero=1), tied=True),
    Case("virtual", [2, 2, 2, 0], Strategy(dp=2, zero=1), virtual_stages=2),
    Case("virtual-even", [1] * 6, Strategy(dp=2), virtual_stages=3),
    Case("virtual-tensor", [1, 2, 1, 2], Strategy(tp=2), virtual_stages=2),
    Case("recompute", [4, 2], Strategy(dp=2), full=[1, 1]),
    Case("experts", [6], Strategy(dp=4, ep=2, zero=1), experts=True),
    Case("experts-pipeline", [4, 2], Strategy(dp=2, ep=2), experts=True),
    Case("experts-virtual", [2, 1, 2, 1], Strategy(dp=2, ep=2, zero=1), virtual_stages=2, experts=True),
]


def write_case(folder: Path, case: Case) -> None:
    """The rendered configuration of a plan, and what else the script needs."""
    model = parse_config(case.config, file="config.json", name="tiny")
    job = Job(global_batch=BATCH, seq_length=LENGTH, precision=Precision(compute=DType.FP32))
    microbatches = BATCH // case.strategy.dp
    shape = {"virtual_stages": case.virtual_stages, "full": case.full}
    plan = make_plan(Target.MEGATRON, case.blocks, case.strategy, job, microbatches=microbatches, **shape)
    devices = case.strategy.num_devices * plan.pp
    files = render(plan, model, read_cluster(f"1x{devices}:a100-80gb"), job)
    folder.mkdir()
    (folder / "mcore_config.py").write_text(files["mcore_config.py"], encoding="utf-8")
    rest: dict[str, Any] = {
        "vocabulary": model.vocab_size, "seq_length": LENGTH, "steps": STEPS,
        "microbatches": microbatches, "dp": case.strategy.dp, "tied": case.tied,
    }  # fmt: skip
    (folder / "case.json").write_text(json.dumps(rest), encoding="utf-8")


def train(folder: Path, world: int, cases: list[Case]) -> str:
    """What the ranks printed."""
    for case in cases:
        write_case(folder / case.name, case)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment = kept | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    logs = [folder / f"{world}-{rank}.log" for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        words = [str(folder / f"store-{world}"), str(rank), str(world), *(str(folder / case.name) for case in cases)]
        with log.open("w", encoding="utf-8") as output:
            ranks.append(
                subprocess.Popen([sys.executable, str(SCRIPT), *words], stdout=output, stderr=output, env=environment)
            )
    try:
        codes = [rank.wait(timeout=SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    text = "\n".join(log.read_text(encoding="utf-8") for log in logs)
    assert codes == [0] * world, text[-6000:]
    return text


def losses(text: str) -> dict[str, list[float]]:
    return {name: json.loads(values) for name, values in re.findall(r"^LOSSES (\S+) (\[.*\])$", text, re.M)}


REFERENCES = [
    Case("dense", [6], Strategy()),
    Case("moe", [6], Strategy(), experts=True),
    Case("dense-tied", [6], Strategy(), tied=True),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, bool], list[float]]:
    """The losses of one process, with experts and with tied embeddings or without."""
    found = losses(train(tmp_path_factory.mktemp("one"), 1, REFERENCES))
    return {(case.experts, case.tied): found[case.name] for case in REFERENCES}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What four processes print, for all cases."""
    return train(tmp_path_factory.mktemp("four"), 4, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_are_those_of_one_process(
    case: Case, output: str, reference: dict[tuple[bool, bool], list[float]]
) -> None:
    found = losses(output)[case.name]
    assert len(found) == STEPS
    assert found == pytest.approx(reference[case.experts, case.tied], rel=1e-5)
    assert found[1] < found[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stages_hold_the_planned_layers(case: Case, output: str) -> None:
    held = dict(re.findall(rf"^STAGE {case.name} (\d+) (\[.*\])$", output, re.M))
    layers = list(range(6))
    parts = []
    for count in case.blocks:
        parts.append(layers[:count])
        layers = layers[count:]
    assert {int(stage): json.loads(text) for stage, text in held.items()} == {
        stage: parts[stage :: case.pp] for stage in range(case.pp)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_send_what_we_count(case: Case, output: str) -> None:
    model = parse_config(case.config, file="config.json", name="tiny")
    job = Job(global_batch=BATCH, seq_length=LENGTH, precision=Precision(compute=DType.FP32))
    costs = counting_costs(model, job, Target.MEGATRON, 4)
    layers = [layer.type for layer in build_graph(model).layers]
    embedding, blocks, head = layers[0], layers[1:-1], layers[-1]
    sent = re.findall(rf"^SENT {case.name} (\d+) (\d+) (\d+)$", output, re.M)
    assert len(sent) == 4
    microbatches = BATCH // case.strategy.dp
    layout = case.strategy.layout
    border = costs.send_seconds(layout, layout, microbatch=case.strategy.dp, pp=2) / 2  # one way, at a byte a second
    for stage, collective, single in (tuple(map(int, words)) for words in sent):
        held = blocks[: sum(case.blocks[stage :: case.pp])]
        held += [embedding] * (stage == 0) + [head] * (stage == case.pp - 1)
        ours = sum(link_bytes(costs, layer, case.strategy, microbatches, pp=case.pp) for layer in held)
        # beside it reductions of a number or a token each: losses, norms, parts of the cross-entropy, routing
        assert collective == pytest.approx(ours, rel=0.02, abs=2000), stage
        # every chunk sends its output on and its gradient back, but for the ends of the model
        sends = 2 * case.virtual_stages - (stage == 0) - (stage == case.pp - 1)
        assert single == pytest.approx(sends * microbatches * border), stage
