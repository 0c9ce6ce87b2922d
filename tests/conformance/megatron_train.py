"""A tiny GPTModel of megatron-core trained on the CPU: ``megatron_train.py STORE RANK WORLD CASES...``.

A case is a folder with a rendered ``mcore_config.py`` and ``case.json`` (vocabulary, sequence length, micro-batches,
steps, data- and expert-parallel degree). Megatron's own schedules, process groups, gradient buffers and optimizers do
the work, over gloo. The last stage prints ``LOSSES name [...]``: means over the global batch, which is the same in
every case, as are the weights. ``STAGE name rank [...]`` says which layers a rank holds, ``SENT name stage collective
single`` the bytes that one sends in a step: over its link in collectives, but for experts' tokens, and to other stages.

What is stood in for: devices (all is on the CPU), the generators of dropout (there is none), and the names of tensor
types that the optimizer looks at.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from link_traffic import LinkTraffic
from script_output import say
from torch.overrides import TorchFunctionMode

traffic = LinkTraffic()
warnings.simplefilter("ignore")
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402

LEARNING_RATE = 1e-2


class OnCpu(TorchFunctionMode):
    """Whatever asks for a GPU gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.record_stream):
            return args[0]
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):  # the optimizer wants tensors of a GPU
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class NoGenerators:
    """In place of Megatron's generators on each GPU."""

    def fork(self, name: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True


def on_host(value: Any, as_numpy: bool = False, **_: Any) -> Any:
    """Numbers of tokens as the host wants them: Megatron only converts what comes from a GPU."""
    return value.numpy() if as_numpy and torch.is_tensor(value) else value


def stand_in() -> None:
    """Do without a GPU."""
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.Stream = torch.cuda.current_stream = MagicMock()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    moe_utils.te_general_gemm = None  # 0.16.1 leaves it undefined without TransformerEngine
    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    megatron_random._CUDA_RNG_STATE_TRACKER = NoGenerators()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    megatron_random._get_all_rng_states = tuple  # recomputed layers run with the generators of the first time
    megatron_random._set_all_rng_states = lambda *_: None


def configurations(folder: Path) -> tuple[Any, Any, Any]:
    """The three objects of the rendered snippet, without what needs a GPU."""
    names: dict[str, Any] = {}
    exec(compile((folder / "mcore_config.py").read_text(encoding="utf-8"), "mcore_config.py", "exec"), names)
    config, ddp, optimizer = (names[f"{part}_config"] for part in ("transformer", "ddp", "optimizer"))
    config.use_cpu_initialization = True
    config.gradient_accumulation_fusion = config.persist_layer_norm = config.masked_softmax_fusion = False
    config.moe_grouped_gemm = False
    config.finalize_model_grads_func = finalize_model_grads
    optimizer.lr = LEARNING_RATE
    return config, ddp, optimizer


def build(config: Any, ddp: Any, case: dict[str, Any]) -> list[Any]:
    """The chunks of this rank's stage."""
    many = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for number in range(many):
        virtual = number if many > 1 else None
        place = {"ignore_virtual": False, "vp_stage": virtual}
        model = GPTModel(
            config,
            layer_spec(config, virtual),
            vocab_size=case["vocabulary"],
            max_sequence_length=case["seq_length"],
            position_embedding_type="rope",
            share_embeddings_and_output_weights=case["tied"],
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=virtual,
        )
        fill(model, config, tied=case["tied"])
        chunks.append(DistributedDataParallel(config, ddp, model, disable_bucketing=number > 0))
    for chunk in chunks:
        chunk.broadcast_params()
    return chunks


def layer_spec(config: Any, virtual: int | None) -> Any:
    """Megatron's layers without TransformerEngine."""
    if config.num_moe_experts:
        kernels = {"use_transformer_engine": False, "normalization": config.normalization}
        return get_gpt_decoder_block_spec(config, vp_stage=virtual, **kernels)
    return get_gpt_layer_local_spec(normalization=config.normalization)


def fill(model: Any, config: Any, *, tied: bool) -> None:
    """Weights that depend on nothing but the parameter's name in the whole model; both copies of a tied embedding have
    one name."""
    layers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    first_expert = parallel_state.get_expert_model_parallel_rank() * (config.num_moe_experts or 0)
    first_expert //= config.expert_model_parallel_size
    for local, parameter in model.named_parameters():
        name = "embedding.word_embeddings.weight" if tied and local == "output_layer.weight" else local
        for prefix, number in layers.items():
            if local.startswith(prefix):
                name = f"layer {number} {local.removeprefix(prefix)}"
        before, experts, after = name.partition("local_experts.")
        if experts:
            number, _, rest = after.partition(".")
            name = f"{before}{experts}{int(number) + first_expert}.{rest}"
        if "layernorm" in name:
            continue
        parameter.data.copy_(part(name, parameter, gated=config.gated_linear_unit and "linear_fc1" in name))


def part(name: str, parameter: Any, *, gated: bool) -> torch.Tensor:
    """This tensor-parallel rank's part of a weight; a gated MLP holds its part of both halves."""
    shape = list(parameter.shape)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    is_split = getattr(parameter, "tensor_model_parallel", False) and tp > 1
    if is_split:
        shape[parameter.partition_dim] *= tp
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(shape, generator=generator) * 0.1
    if not is_split:
        return whole
    rank = parallel_state.get_tensor_model_parallel_rank()
    halves = whole.chunk(2) if gated else (whole,)
    return torch.cat([half.chunk(tp, parameter.partition_dim)[rank] for half in halves])


def micro_batches(case: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """What this replica reads in every step: counting upwards from random starts, which can be learned."""
    length, many, dp = case["seq_length"], case["microbatches"], case["dp"]
    starts = torch.randint(case["vocabulary"], (many * dp, 1), generator=torch.Generator().manual_seed(7))
    ids = (starts + torch.arange(length + 1)) % case["vocabulary"]
    own = parallel_state.get_data_parallel_rank()
    for index in range(many):
        row = ids[index * dp + own]
        yield {"ids": row[None, :-1], "labels": row[None, 1:], "positions": torch.arange(length)[None]}


def forward(iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    """One micro-batch through one chunk."""
    batch = next(iterator)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = output.float().mean()
        return value, {"loss": value.detach().clone()}  # Megatron divides the value in place

    length = batch["ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return model(batch["ids"], batch["positions"], mask, labels=batch["labels"]), loss


def train(folder: Path) -> None:
    """Train by one case and print its losses."""
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    config, ddp, optimizer_config = configurations(folder)
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
    )
    chunks = build(config, ddp, case)
    numbers = [[layer.layer_number - 1 for layer in chunk.module.decoder.layers] for chunk in chunks]
    say(f"STAGE {folder.name} {parallel_state.get_pipeline_model_parallel_rank()} {json.dumps(numbers)}")
    optimizer = get_megatron_optimizer(optimizer_config, chunks)
    losses = []
    for _ in range(case["steps"]):
        traffic.reset()
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        iterators = [micro_batches(case) for _ in chunks]
        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=case["microbatches"],
            seq_length=case["seq_length"],
            micro_batch_size=1,
            forward_only=False,
        )
        succeeded, *_ = optimizer.step()
        if not succeeded:
            raise RuntimeError("the optimizer refused the step")
        losses.append(sum(float(result["loss"]) for result in results) / case["microbatches"])
    sent = f"{traffic.collective:.0f} {traffic.single:.0f}"
    say(f"SENT {folder.name} {parallel_state.get_pipeline_model_parallel_rank()} {sent}")
    if parallel_state.is_pipeline_last_stage():
        mean = torch.tensor(losses)
        torch.distributed.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_data_parallel_rank() == 0:
            say(f"LOSSES {folder.name} {json.dumps((mean / case['dp']).tolist())}")
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()


def main() -> None:
    """Train by each case."""
    store, rank, world, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=Path(store).resolve().as_uri(), rank=int(rank), world_size=int(world)
    )
    stand_in()
    with OnCpu():
        for folder in cases:
            train(Path(folder))
    # Ranks that tear down at different times can abort in gloo's threads, after all the work is done.
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


main()
