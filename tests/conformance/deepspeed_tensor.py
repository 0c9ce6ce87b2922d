"""What automatic tensor parallelism sends and holds: the script of test_deepspeed_tensor.py.

``deepspeed deepspeed_tensor.py CONFIG.json ...`` trains a micro-batch of each model of transformers on two ranks. Rank
0 prints ``SENT name [bytes]`` over its link and ``HELD name [parameters]``, or ``FAILED name``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from link_traffic import LinkTraffic
from script_output import say

traffic = LinkTraffic()

import deepspeed  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

# gloo alone: DeepSpeed's shared memory on CPUs is compiled for minutes.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 8,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "zero_optimization": {"stage": 0},
    "tensor_parallel": {"autotp_size": 2},
}


def run(path: Path) -> None:
    """One micro-batch, of several in a step, so that no gradients of replicas are reduced."""
    torch.manual_seed(7)
    values = json.loads(path.read_text(encoding="utf-8"))
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=CONFIG)
    ids = torch.zeros(1, 8, dtype=torch.long)
    traffic.reset()
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    if engine.global_rank == 0:
        say(f"SENT {path.name} [{round(traffic.collective)}]")
        say(f"HELD {path.name} [{sum(parameter.numel() for parameter in engine.module.parameters())}]")
    engine.destroy()


if __name__ == "__main__":
    deepspeed.init_distributed()
    for name in [word for word in sys.argv[1:] if not word.startswith("--")]:
        try:
            run(Path(name))
        except Exception as error:
            if torch.distributed.get_rank() == 0:
                say(f"FAILED {Path(name).name} {type(error).__name__}: {str(error)[:200]!r}")
        gc.collect()
    torch.distributed.barrier()
    os._exit(0)
