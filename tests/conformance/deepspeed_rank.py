"""What DeepSpeed's engine holds between micro-batches and sends in a step: the script of test_deepspeed_rank.py.

``deepspeed deepspeed_rank.py MODEL.json CONFIG.json ...``, each with two micro-batches a step. Of the second step
rank 0 prints ``HELD name [bytes]``, all tensors that live after the first of its two backward passes, and ``SENT name
[bytes]``, over its link.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from held_tensors import held
from link_traffic import LinkTraffic
from script_output import say

traffic = LinkTraffic()

import deepspeed  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

# gloo alone: DeepSpeed's shared memory on CPUs is compiled for minutes.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def run(model: dict[str, object], path: Path) -> None:
    """Two steps by one configuration."""
    torch.manual_seed(7)
    network = LlamaForCausalLM(LlamaConfig(**model))
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=str(path))
    ids = torch.zeros(1, 8, dtype=torch.long)
    for step in range(2):
        traffic.reset()
        for micro_batch in range(2):
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            del loss
            if step == 1 and micro_batch == 0:
                least = held()
            engine.step()
    if engine.global_rank == 0:
        say(f"HELD {path.name} [{least}]")
        say(f"SENT {path.name} [{round(traffic.collective)}]")
    engine.destroy()


if __name__ == "__main__":
    deepspeed.init_distributed()
    arguments = [word for word in sys.argv[1:] if not word.startswith("--")]
    for name in arguments[1:]:
        run(json.loads(Path(arguments[0]).read_text(encoding="utf-8")), Path(name))
        gc.collect()
    torch.distributed.barrier()
    os._exit(0)
