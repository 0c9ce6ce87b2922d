"""Jobs with plans that cover what the renderers can say: shared by the tests of rendered files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.plans import make_plan
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import read_model
from uniap_tune.plan import Plan
from uniap_tune.render import render
from uniap_tune.spec import Cluster, DType, Job, Model, OptimizerName, Precision, Recompute
from uniap_tune.strategy import Strategy, Target


@dataclass(frozen=True)
class Launch:
    """A plan and what it is for."""

    name: str
    model: Model
    cluster: Cluster
    job: Job
    plan: Plan

    def files(self) -> dict[str, str]:
        """Its launch files."""
        return render(self.plan, self.model, self.cluster, self.job)


def launch(
    model: str,
    cluster: str,
    blocks: list[int],
    strategy: dict[str, Any],
    *,
    target: Target = Target.MEGATRON,
    full: list[int] | None = None,
    virtual_stages: int = 1,
    microbatches: int = 8,
    micro_batch: int = 1,
    seq_length: int = 4096,
    **job: Any,
) -> Launch:
    """A launch with one grid; ``tp`` above 1 brings sequence parallelism with it for Megatron."""
    spread = {"sequence_parallel": target is Target.MEGATRON and strategy.get("tp", 1) > 1} | strategy
    grid = Strategy(**spread)
    work = Job(global_batch=micro_batch * microbatches * grid.dp, seq_length=seq_length, **job)
    plan = make_plan(target, blocks, grid, work, microbatches=microbatches, full=full, virtual_stages=virtual_stages)
    return Launch(
        f"{model}-{'_'.join(map(str, blocks[:4]))}{f'-vpp{virtual_stages}' * (virtual_stages > 1)}"
        f"-{grid.describe()}".replace(" ", "-"),
        read_model(model),
        read_cluster(cluster),
        work,
        plan,
    )


def megatron_launches() -> list[Launch]:
    """Plans for Megatron: architectures, grids, splits, ZeRO, recompute, precision."""
    fp16 = Precision(compute=DType.FP16)
    return [
        launch("llama-2-7b", "1x8:a100-80gb", [32], {"dp": 8}),
        launch("llama-2-7b", "1x8:a100-80gb", [32], {"dp": 8, "zero": 1, "recompute": Recompute.FULL}),
        launch("llama-2-7b", "1x8:a100-80gb", [15, 17], {"tp": 2, "dp": 2, "zero": 1}),
        launch("llama-2-7b", "1x8:a100-80gb", [7, 9, 9, 7], {"tp": 2}, full=[3, 3, 3, 3]),
        launch("llama-2-7b", "1x8:a100-80gb", [32], {"dp": 8, "zero": 2}),
        launch("llama-2-7b", "1x8:a100-80gb", [32], {"tp": 2, "dp": 4, "zero": 3}),
        launch("llama-2-13b", "2x8:v100-32gb", [9, 10, 11, 10], {"tp": 4}, precision=fp16, flash_attention=False),
        launch("llama-2-13b", "2x8:a100-40gb", [20, 20], {"dp": 8, "zero": 1}, full=[5, 5], micro_batch=2),
        launch("llama-2-70b", "8x8:h100", [20] * 4, {"tp": 8, "dp": 2, "zero": 1}),
        launch("llama-3-8b", "1x8:h100", [32], {"tp": 4, "dp": 2, "zero": 1}, seq_length=8192),
        launch("llama-3-8b", "2x8:h100", [0, 16, 16, 0], {"tp": 4, "zero": 0}, seq_length=8192),
        launch("llama-3-8b", "1x8:h100", [32], {"dp": 8, "zero": 3}, precision=Precision(compute=DType.FP8)),
        launch("llama-3-70b", "8x8:h100", [19, 20, 20, 21], {"tp": 8, "dp": 2, "zero": 1}, seq_length=8192),
        launch("llama-3-70b", "8x8:h100", [10, 11] * 3 + [11, 6], {"tp": 8}, full=[4, 4, 4, 4, 4, 4, 4, 4]),
        launch("llama-3.1-8b", "4x8:h100", [32], {"tp": 2, "cp": 4, "dp": 4, "zero": 1}, seq_length=65536),
        launch("llama-3.1-405b", "64x8:h100", [7] + [8] * 14 + [7], {"tp": 8, "dp": 4, "zero": 1}, seq_length=8192),
        launch("gpt-3-175b", "16x8:a100-80gb", [12] * 8, {"tp": 8, "dp": 2}, seq_length=2048),
        launch("gpt-530b", "35x8:a100-80gb", [3] * 35, {"tp": 8}, seq_length=2048, microbatches=70),
        launch("gpt-1t", "384x8:a100-80gb", [2] * 64, {"tp": 8, "dp": 6, "zero": 1}, full=[1] * 64, seq_length=2048),
        launch("gpt2-xl", "1x4:rtx-4090", [12, 11, 12, 13], {}, seq_length=1024, optimizer=OptimizerName.SGD),
        launch("gpt2", "1x8:titan-xp", [12], {"dp": 8, "zero": 1}, seq_length=1024, precision=fp16),
        launch("qwen3-32b", "4x8:h100", [16] * 4, {"tp": 4, "dp": 2, "zero": 1}),
        launch("qwen2.5-7b", "1x8:h200", [28], {"tp": 2, "dp": 4, "zero": 1}, optimizer_state_bytes=4),
        launch("qwen2.5-0.5b", "1x8:l4", [24], {"tp": 2, "dp": 4}, precision=Precision(compute=DType.FP32)),
        launch("mistral-7b", "1x8:h100", [8] * 4, {"dp": 2, "zero": 1}, seq_length=8192),
        launch("phi-3-mini", "1x8:a100-40gb", [32], {"dp": 8, "zero": 2}),
        launch("nemotron-4-15b", "2x8:h100", [16, 16], {"tp": 8, "zero": 0}),
        launch("nemotron-4-340b", "16x8:b200", [11, 12, 12, 12, 12, 12, 12, 13], {"tp": 8, "dp": 2, "zero": 1}),
        launch("llama-3-8b", "1x8:b200", [32], {"tp": 2, "dp": 4}, precision=Precision(compute=DType.MXFP8)),
        launch("llama-2-7b", "1x8:h100", [32], {"dp": 8, "zero": 1}, precision=Precision(gradient_bytes=2)),
        launch("llama-2-7b", "1x8:h100", [32], {"dp": 8, "recompute": Recompute.SELECTIVE}, flash_attention=False),
        launch("mixtral-8x7b", "4x8:h100", [8] * 4, {"tp": 2, "dp": 4, "ep": 4, "etp": 2, "zero": 1}),
        launch("deepseek-v3", "32x8:h100", [4] * 15 + [1], {"dp": 16, "ep": 16, "zero": 1}),
        launch("deepseek-v3", "32x8:h100", [3] * 3 + [4] * 13, {"dp": 16, "ep": 16, "zero": 1}),
        launch("qwen3-30b-a3b", "2x8:h100", [23, 25], {"tp": 2, "dp": 4, "ep": 8, "zero": 1}),
        *virtual_launches(),
    ]


def virtual_launches() -> list[Launch]:
    """Plans for Megatron with virtual stages of one size and not, with experts on their own grid, with both."""
    h100 = "8x8:h100"
    return [
        launch("llama-3-70b", h100, [4] * 20, {"tp": 4, "cp": 2, "dp": 2, "zero": 1}, virtual_stages=5),
        launch("llama-3-70b", h100, [9] + [10] * 6 + [11], {"tp": 8, "dp": 2, "zero": 1}, virtual_stages=2),
        launch("llama-3-70b", h100, [3, 4] + [4] * 17 + [5], {"tp": 8, "dp": 2}, full=[1] * 20, virtual_stages=5),
        launch("llama-3-8b", "2x8:h100", [0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2], {"tp": 4}, virtual_stages=3),
        launch("gpt-3-175b", "16x8:a100-80gb", [3] * 32, {"tp": 8, "dp": 2}, virtual_stages=4, seq_length=2048),
        launch("gpt-1t", "64x8:h100", [1] * 128, {"tp": 8}, virtual_stages=2, microbatches=64, seq_length=2048),
        launch(
            "llama-3.1-405b", "64x8:h100", [0, *[1] * 126, 0], {"tp": 8, "dp": 4}, virtual_stages=8, microbatches=16
        ),
        launch("mixtral-8x7b", h100, [8] * 4, {"dp": 16, "ep": 8, "zero": 1}),
        launch("mixtral-8x7b", h100, [4] * 8, {"tp": 2, "dp": 8, "ep": 8, "zero": 1}, virtual_stages=2),
        launch("mixtral-8x7b", h100, [3, 4, 4, 4, 4, 4, 4, 5], {"tp": 4, "dp": 4, "ep": 2, "etp": 4}, virtual_stages=2),
        launch("mixtral-8x22b", "16x8:h100", [7] * 8, {"tp": 2, "cp": 2, "dp": 4, "ep": 8, "zero": 1}),
        launch("qwen3-30b-a3b", "2x8:h100", [48], {"dp": 16, "ep": 16, "zero": 1}),
        launch("qwen3-30b-a3b", "4x8:h100", [6] * 8, {"tp": 2, "dp": 4, "ep": 8, "zero": 1}, virtual_stages=2),
        launch("qwen3-235b-a22b", "16x8:h100", [11, *[12] * 6, 11], {"tp": 4, "dp": 4, "ep": 16, "zero": 1}),
        launch("deepseek-v3", "32x8:h100", [1, *[2] * 30, 0], {"dp": 16, "ep": 16}, virtual_stages=2, microbatches=32),
    ]


def deepspeed_launches() -> list[Launch]:
    """Plans for DeepSpeed: ZeRO 0 to 3, tensor parallelism, pipelines."""
    deepspeed: dict[str, Any] = {"target": Target.DEEPSPEED}
    fp16 = Precision(compute=DType.FP16)
    full = Recompute.FULL
    return [
        launch("gpt2-xl", "1x8:v100-32gb", [48], {"dp": 8}, seq_length=1024, precision=fp16, **deepspeed),
        launch("llama-2-7b", "1x8:a100-80gb", [32], {"dp": 8, "zero": 1}, **deepspeed),
        launch("llama-2-7b", "1x8:a100-80gb", [32], {"dp": 8, "zero": 2, "recompute": full}, **deepspeed),
        launch("llama-2-70b", "8x8:h100", [80], {"dp": 64, "zero": 3, "recompute": full}, **deepspeed),
        launch("llama-3-8b", "1x8:h100", [32], {"tp": 2, "dp": 4, "zero": 2}, **deepspeed),
        launch("llama-3-70b", "4x8:h100", [80], {"tp": 8, "dp": 4, "zero": 3}, micro_batch=2, **deepspeed),
        launch("llama-2-13b", "1x8:a100-80gb", [19, 21], {"dp": 4, "zero": 1}, **deepspeed),
        launch("llama-2-13b", "2x8:a100-80gb", [0, 13, 14, 13], {"dp": 4, "recompute": full}, **deepspeed),
        launch("bloom-176b", "48x8:a100-80gb", [6] * 11 + [4], {"dp": 32, "zero": 1}, seq_length=2048, **deepspeed),
        launch(
            "gpt2", "1x4:l4", [12], {"dp": 4}, seq_length=1024, precision=Precision(compute=DType.FP32), **deepspeed
        ),
        launch("qwen3-8b", "1x8:h100", [36], {"dp": 8, "zero": 1}, precision=Precision(gradient_bytes=4), **deepspeed),
        launch("mistral-7b", "128x8:h100", [32], {"tp": 8, "dp": 128, "zero": 1}, **deepspeed),
    ]
