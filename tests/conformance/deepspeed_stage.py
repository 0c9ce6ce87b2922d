"""What a stage of DeepSpeed's pipeline engine holds and sends in a step: a script of test_deepspeed_rank.py.

``deepspeed deepspeed_stage.py CONFIG.json ...`` trains two stages of equal blocks. Of the second step rank 0 prints
``HELD name [bytes]``, a parameter's, when all micro-batches have been through and nothing is reduced yet, and ``SENT
name [bytes]``, a parameter's, over its link from there on.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from held_tensors import held
from link_traffic import LinkTraffic
from script_output import say
from torch import nn

traffic = LinkTraffic()

import deepspeed  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule  # noqa: E402
from deepspeed.runtime.pipe.schedule import ReduceGrads  # noqa: E402

# gloo alone: DeepSpeed's shared memory on CPUs is compiled for minutes.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
WIDTH = 128


class Block(nn.Module):
    """An MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same micro-batch for ever."""
    while True:
        yield torch.ones(1, 1, WIDTH, dtype=torch.bfloat16), torch.zeros(1, 1, WIDTH, dtype=torch.bfloat16)


def run(path: Path) -> None:
    """Two steps by one configuration."""
    torch.manual_seed(7)
    network = PipelineModule(
        layers=[LayerSpec(Block) for _ in range(32)],
        num_stages=2,
        loss_fn=nn.functional.mse_loss,
        partition_method="uniform",
    )
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=str(path))
    micro_batches = batches()
    engine.train_batch(data_iter=micro_batches)
    instructions = engine._INSTRUCTION_MAP
    reduce, least = instructions[ReduceGrads], 0

    def look(*args: object, **kwargs: object) -> None:
        nonlocal least
        least = held()
        traffic.reset()
        reduce(*args, **kwargs)

    instructions[ReduceGrads] = look
    engine.train_batch(data_iter=micro_batches)
    instructions[ReduceGrads] = reduce
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if engine.global_rank == 0:
        say(f"HELD {path.name} [{least / parameters}]")
        say(f"SENT {path.name} [{traffic.collective / parameters}]")
    engine.destroy()


if __name__ == "__main__":
    deepspeed.init_distributed()
    for name in [word for word in sys.argv[1:] if not word.startswith("--")]:
        run(Path(name))
        gc.collect()
    torch.distributed.barrier()
    os._exit(0)
