"""A small language model trained by DeepSpeed, beside the same training by torch alone: the script of the tests.

It is what a user's script looks like: ``deepspeed train.py --deepspeed --deepspeed_config ds.json``. Rank 0 prints
``LOSSES name [...]`` for each configuration and ``REFERENCE name [...]`` for one process that knows nothing of
DeepSpeed. Losses are means over the global batch, which is the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

# gloo alone: DeepSpeed's shared memory on CPUs is compiled for minutes, and spins where cores are fewer than ranks.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

VOCABULARY, WIDTH, LENGTH = 64, 32, 16
LEARNING_RATE = 5e-3


class Embedding(nn.Module):
    """Tokens and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        attention = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x = x + self.out(attention)
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Head(nn.Module):
    """Norm and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.norm(x))


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gpt(blocks: int) -> list[nn.Module]:
    """The layers, always with the same weights."""
    torch.manual_seed(7)
    return [Embedding(), *(Block() for _ in range(blocks)), Head()]


class Whole(nn.Module):
    """The layers as one module that returns its loss."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss_of(self.layers(ids), labels)


class Llama(nn.Module):
    """transformers' own, tiny, returning its loss."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(7)
        self.inner = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=False,
            )
        )
        self.config = self.inner.config

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss_of(self.inner(input_ids=ids).logits, labels)


def samples(step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a step: counting upwards from a random start, which can be learned."""
    starts = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(step))
    ids = (starts + torch.arange(LENGTH + 1)) % VOCABULARY
    return ids[:, :-1], ids[:, 1:]


def micro_batches(step: int, config: dict[str, Any], rank: int, ranks: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """What one of ``ranks`` data-parallel ranks reads in a step."""
    size, steps = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    ids, labels = samples(step, size * steps * ranks)
    for index in range(steps):
        start = (index * ranks + rank) * size
        yield ids[start : start + size], labels[start : start + size]


def train(engine: Any, config: dict[str, Any], steps: int, tensor: int) -> list[float]:
    """Losses of the engine's steps."""
    world, own = torch.distributed.get_world_size() // tensor, torch.distributed.get_rank() // tensor
    losses = []
    for step in range(steps):
        total = torch.zeros(())
        for ids, labels in micro_batches(step, config, own, world):
            loss = engine(ids, labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / (config["gradient_accumulation_steps"] * world * tensor))
    return losses


def train_pipeline(engine: Any, config: dict[str, Any], steps: int) -> list[float]:
    """Losses of a pipeline engine's steps."""
    grid = engine.grid
    rank, ranks = grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()
    return [
        float(engine.train_batch(data_iter=micro_batches(step, config, rank, ranks))) for step in range(steps)
    ]  # fmt: skip


def reference(model: nn.Module, config: dict[str, Any], steps: int, ranks: int) -> list[float]:
    """Losses of one process without DeepSpeed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * ranks
    losses = []
    for step in range(steps):
        loss = model(*samples(step, batch))
        optimizer.zero_grad()
        loss.backward()
        if config.get("gradient_clipping"):
            nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clipping"])
        optimizer.step()
        losses.append(loss.item())
    return losses


def say(text: str) -> None:
    """A line of its own on stdout, whole, whatever other ranks write at the same time."""
    os.write(1, f"\n{text}\n".encode())


def run(args: argparse.Namespace, path: str) -> None:
    """Train by one configuration, and beside DeepSpeed."""
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    tensor = config.get("tensor_parallel", {}).get("autotp_size") or 1
    world = int(os.environ["WORLD_SIZE"])
    settings = {"config": path}
    if args.model == "pipeline":
        model = pipeline(args)
        ranks = world // model.num_stages
    else:
        model = Llama() if args.model == "llama" else Whole(gpt(args.blocks))
        ranks = world // tensor
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "optimizer" not in config:
        settings["optimizer"] = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, **settings)
    config["gradient_accumulation_steps"] = engine.gradient_accumulation_steps()
    config["train_micro_batch_size_per_gpu"] = engine.train_micro_batch_size_per_gpu()
    if args.model == "pipeline":
        losses = train_pipeline(engine, config, args.steps)
        say(f"STAGE {engine.stage_id} {len(engine.module.forward_funcs)} layers of {model.parts}")
    else:
        losses = train(engine, config, args.steps, tensor)
    if torch.distributed.get_rank() == 0:
        plain = Llama() if args.model == "llama" else Whole(gpt(args.blocks))
        say(f"LOSSES {Path(path).name} {json.dumps(losses)}")
        say(f"REFERENCE {Path(path).name} {json.dumps(reference(plain, config, args.steps, ranks))}")


def pipeline(args: argparse.Namespace) -> Any:
    """The layers in a pipeline: cut by the plan through the helper, or as an unmodified script would."""
    deepspeed.init_distributed()
    if args.plan:
        from uniap_tune.deepspeed import pipeline_module as planned

        return planned(gpt(args.blocks), plan=args.plan, loss_fn=loss_of)
    from deepspeed.pipe import PipelineModule

    return PipelineModule(layers=gpt(args.blocks), num_stages=2, loss_fn=loss_of, partition_method="uniform")


def main() -> None:
    """Train by each configuration."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--model", choices=("gpt", "pipeline", "llama"), default="gpt")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--plan", default="")
    parser.add_argument("--fail", type=int, default=0, help="exit with this code")
    parser.add_argument("--configs", nargs="*", default=[])
    args = deepspeed.add_config_arguments(parser).parse_args()
    if args.fail:
        print("this script fails on purpose", file=sys.stderr)
        sys.exit(args.fail)
    for path in args.configs or [args.deepspeed_config]:
        run(args, path)
    # Ranks that tear down at different times can abort in gloo's threads, after all the work is done.
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


main()
