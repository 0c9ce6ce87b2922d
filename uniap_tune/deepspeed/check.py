"""Would DeepSpeed accept this configuration on this many devices? Asked before anything runs.

Two answers are put together: rules of our own, for what DeepSpeed accepts silently and then does not do or does wrongly
(0.19.8), and DeepSpeed itself, in a process of its own (:mod:`uniap_tune.deepspeed.dryrun`). It is about configuration
and topology; memory is the planner's business.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from uniap_tune.adapters.deepspeed import UNTESTED_WITH_ZERO, optimizer_type

if TYPE_CHECKING:
    from uniap_tune.plan import Plan
    from uniap_tune.planner import Request

_SECONDS = 600.0
_LAYERS = 4

# Keys of zero_optimization that DeepSpeed 0.19.8 accepts below stage 3, where they do nothing.
_STAGE_3_KEYS = ("offload_param", "zero_quantized_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A configuration and where it is to run.

    Attributes:
        config: the DeepSpeed JSON.
        world_size: devices.
        layers: layers of the model, embedding and head counted.
        parts: bounds of the pipeline stages in ``layers``; empty: no pipeline.
    """

    config: Mapping[str, Any]
    world_size: int
    layers: int = _LAYERS
    parts: tuple[int, ...] = ()

    @property
    def pp(self) -> int:
        """Pipeline stages; 0: no ``PipelineModule``."""
        return max(len(self.parts) - 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer. ``roles``: kinds of ranks whose engine was built; 0: DeepSpeed was not asked, ``reason`` says why."""

    refused: bool
    reason: str = ""
    roles: int = 0
    version: str = ""

    @property
    def sentence(self) -> str:
        """For people."""
        if self.refused:
            return f"refused: {self.reason}"
        if not self.roles:
            return f"not tried: {self.reason}"
        kinds = "1 kind of rank" if self.roles == 1 else f"{self.roles} kinds of ranks"
        return f"DeepSpeed {self.version} accepts it; engine built for {kinds}"


def check_cases(cases: Sequence[Case], *, timeout: float | None = None) -> list[Verdict]:
    """A verdict for each case.

    Args:
        cases: what to try.
        timeout: seconds for all of them together.
    """
    verdicts: dict[int, Verdict] = {}
    for index, case in enumerate(cases):
        reason = broken_rule(case)
        if reason:
            verdicts[index] = Verdict(refused=True, reason=reason)
    left = [index for index in range(len(cases)) if index not in verdicts]
    answers = _ask([cases[index] for index in left], timeout or _SECONDS) if left else []
    return [
        verdicts[index] if index in verdicts else answers[left.index(index)]
        for index in range(len(cases))
    ]  # fmt: skip


def check_plan(plan: Plan, request: Request) -> Verdict:
    """The verdict on the configuration that is rendered for a plan."""
    from uniap_tune.render.deepspeed import deepspeed_config, pipeline_split

    case = Case(
        config=deepspeed_config(plan, request.model, request.job),
        world_size=request.cluster.num_devices,
        layers=len(plan.strategies),
        parts=tuple(pipeline_split(plan)["parts"]) if plan.pp > 1 else (),
    )
    return check_cases([case])[0]


def broken_rule(case: Case) -> str:
    """What is wrong that DeepSpeed itself would not say; empty: nothing."""
    world, zero = case.world_size, case.config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    stage = zero.get("stage", 0)
    kind = optimizer_type(case.config)
    if stage in (1, 2, 3) and kind in UNTESTED_WITH_ZERO and not case.config.get("zero_allow_untested_optimizer"):
        return f"ZeRO with {kind} needs zero_allow_untested_optimizer (runtime/engine.py:2299)"
    tensor = tensor_size(case.config)
    if world % tensor:
        return f"tensor_parallel.autotp_size {tensor} does not divide the world size {world}"
    if case.pp and world % case.pp:
        return f"{case.pp} pipeline stages do not divide the world size {world}"
    if case.pp and tensor != 1:
        return f"automatic tensor parallelism ({tensor}) does not work in a pipeline ({case.pp} stages)"
    if case.pp and case.parts[-1] != case.layers:
        return f"the pipeline's parts end at {case.parts[-1]}, the model has {case.layers} layers"
    if not isinstance(stage, int) or stage >= 3:
        return ""
    shards = zero.get("zero_hpz_partition_size", 1)
    if shards not in (0, 1):
        return f"zero_optimization.zero_hpz_partition_size {shards} needs ZeRO stage 3, the stage is {stage}"
    for key in _STAGE_3_KEYS:
        value = zero.get(key)
        if value and value != {"device": "none"}:
            return f"zero_optimization.{key} needs ZeRO stage 3, the stage is {stage}"
    return ""


def tensor_size(config: Mapping[str, Any]) -> int:
    """The degree of automatic tensor parallelism; 1: none."""
    section = config.get("tensor_parallel")
    size = section.get("autotp_size") if isinstance(section, dict) else None
    return size if isinstance(size, int) and size > 1 else 1


def _ask(cases: Sequence[Case], timeout: float) -> list[Verdict]:
    """DeepSpeed's answers; a case it was not asked about is not refused."""
    if find_spec("deepspeed") is None:
        return [Verdict(refused=False, reason="DeepSpeed is not installed here")] * len(cases)
    text = json.dumps([{**asdict(case), "config": dict(case.config)} for case in cases])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "uniap_tune.deepspeed.dryrun"]
    try:
        run = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=timeout, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return [Verdict(refused=False, reason=f"DeepSpeed did not answer within {timeout:.0f} s")] * len(cases)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    missing = len(cases) - len(answers)
    last = run.stderr.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
    return [Verdict(**answer) for answer in answers] + [Verdict(refused=False, reason=last[0][:300])] * missing
