"""Builds DeepSpeed's engine for configurations without their devices: ``python -m uniap_tune.deepspeed.dryrun``.

Reads a JSON list of cases on stdin and answers each with a line of JSON, a
:class:`~uniap_tune.deepspeed.check.Verdict`. ``torch.distributed`` runs on its fake backend, whose collectives do
nothing, so one process can be any rank of any world. That backend is private to torch: hence the process of its own,
and an error in setting it up is an answer, not a refusal.

DeepSpeed is imported once and every rank is a fork, because an engine leaves global state behind.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

from uniap_tune.deepspeed.check import tensor_size

# What the engine is built with; monitors, profilers, data and checkpoint sections would write files or read data.
_ENGINE_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "bfloat16", "tensor_parallel", "pipeline", "activation_checkpointing",
    "communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor",
    "gradient_allreduce_op", "zero_allow_untested_optimizer",
)  # fmt: skip
# What building an engine imports besides; imported before forking, once.
_PRELOADED = (
    "torch._dynamo", "deepspeed.pipe", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.bf16_optimizer", "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.testing._internal.distributed.fake_pg",
)  # fmt: skip

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# How the layers of the stand-in are split by automatic tensor parallelism, in the words of transformers.
_TENSOR_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


class _Unit:
    """What ``DeepSpeedConfig`` asks of a model-parallel unit."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_data_parallel_world_size(self) -> int:
        """Ranks the batch is spread over."""
        return self.count


def answer(case: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict of one case, as keywords of ``Verdict``."""
    import deepspeed

    config = _filled(case["config"])
    reason = _refusal_of_config(config, case)
    if reason:
        return {"refused": True, "reason": reason}
    ranks = _ranks(case)
    for rank in ranks:
        kind, text = _in_fork(_engine_config(config), case, rank)
        if kind == "setup":
            return {"refused": False, "reason": f"the dry run needs another torch: {text}"}
        if kind:
            return {"refused": True, "reason": f"rank {rank} of {case['world_size']}: {text}"}
    return {"refused": False, "roles": len(ranks), "version": str(deepspeed.__version__)}


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the ``"auto"`` batch sizes gone, which only the Trainer of transformers reads."""
    filled = {key: value for key, value in config.items() if key not in _BATCH_KEYS or value != "auto"}
    if not any(key in filled for key in _BATCH_KEYS[:2]):
        filled["train_micro_batch_size_per_gpu"] = 1
    return filled


def _refusal_of_config(config: dict[str, Any], case: Mapping[str, Any]) -> str:
    """What ``DeepSpeedConfig`` has against the whole configuration."""
    import deepspeed.runtime.config as ds_config

    stages = max(len(case["parts"]) - 1, 1)
    # Under automatic tensor parallelism DeepSpeed spreads the batch over all ranks.
    unit = _Unit(case["world_size"] // stages)
    try:
        with mock.patch.object(ds_config.dist, "get_rank", return_value=0):  # else the world is taken for one rank
            ds_config.DeepSpeedConfig(json.loads(json.dumps(config)), mpu=unit)
    except Exception as error:
        return _short(error)
    return ""


def _engine_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as far as a CPU can run it: what it lacks is replaced by its nearest."""
    reduced = {key: value for key, value in config.items() if key in _ENGINE_KEYS}
    if (config.get("fp16") or {}).get("enabled") is True:
        reduced["bf16"] = {"enabled": True}
    reduced["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    zero = reduced.get("zero_optimization")
    if isinstance(zero, dict):
        kept = {key: value for key, value in zero.items() if not key.startswith("zero_quantized")}
        for key in ("offload_optimizer", "offload_param"):
            kept.pop(key, None)  # it would compile an optimizer and open files
        reduced["zero_optimization"] = kept
    return reduced


def _ranks(case: Mapping[str, Any]) -> list[int]:
    """One rank of each kind: first and last, each stage that differs, each end of a tensor-parallel group."""
    world, parts = case["world_size"], case["parts"]
    ranks = {0, world - 1}
    tensor = tensor_size(case["config"])
    if tensor > 1:
        ranks.add(tensor - 1)
    stages = len(parts) - 1
    sizes = set()
    for stage in range(1, stages - 1):
        size = parts[stage + 1] - parts[stage]
        if size not in sizes:
            sizes.add(size)
            ranks.add(stage * (world // stages))
    if stages > 1:
        ranks.add((stages - 1) * (world // stages))
    return sorted(ranks)


def _in_fork(config: dict[str, Any], case: Mapping[str, Any], rank: int) -> tuple[str, str]:
    """Build the engine of a rank in a child: what went wrong (``setup`` or ``engine``, empty: nothing) and its text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = ["", ""]
        try:
            outcome = list(_build(config, case, rank))
        finally:
            os.write(writing, json.dumps(outcome).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return "engine", f"DeepSpeed ended the process (status {status})"
    kind, message = json.loads(text)
    return kind, message


def _build(config: dict[str, Any], case: Mapping[str, Any], rank: int) -> tuple[str, str]:
    import deepspeed

    try:
        _fake_world(rank, case["world_size"])
    except Exception as error:
        return "setup", _short(error)
    try:
        model = _pipeline(case["parts"]) if case["parts"] else _stand_in(case["layers"], tensor_size(config))
        deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    except Exception as error:
        return "engine", _short(error)
    return "", ""


def _fake_world(rank: int, world_size: int) -> None:
    """Be this rank of a world that is not there."""
    import deepspeed.comm
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # It would be compiled, and then wait for the other ranks in shared memory. The attribute path of this module leads
    # to torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.comm.init_distributed(dist_backend="gloo", dist_init_required=False)


def _stand_in(layers: int, tensor: int) -> Any:
    """A model of as many tiny layers, named as automatic tensor parallelism expects."""
    from torch import nn

    width = 2 * tensor

    def block() -> nn.Module:
        names = (("self_attn", ("q_proj", "o_proj")), ("mlp", ("up_proj", "down_proj")))
        parts = {
            part: nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in inner}) for part, inner in names
        }
        return nn.ModuleDict(parts)

    model = nn.Module()
    model.layers = nn.ModuleList(block() for _ in range(layers))
    model.config = SimpleNamespace(
        base_model_tp_plan=_TENSOR_PLAN,
        num_attention_heads=tensor,
        num_key_value_heads=tensor,
        hidden_size=width,
        tie_word_embeddings=False,
    )
    return model


def _pipeline(parts: list[int]) -> Any:
    """A pipeline of as many tiny layers, cut at these bounds."""
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    class Cut(PipelineModule):  # type: ignore[misc]
        """Cut where the plan says."""

        def _partition_layers(self, method: str = "uniform") -> None:  # noqa: ARG002 - the plan is the method
            self.parts = list(parts)
            stage = self._topo.get_coord(self.global_rank).pipe
            self._set_bounds(start=parts[stage], stop=parts[stage + 1])

    specs = [LayerSpec(nn.Linear, 4, 4) for _ in range(parts[-1])]
    return Cut(layers=specs, num_stages=len(parts) - 1, loss_fn=nn.MSELoss())


def _short(error: Exception) -> str:
    """The error in one line, its own words first."""
    text = " ".join(str(error).split()).partition(" For further information visit")[0] or "without a message"
    return f"{type(error).__name__}: {text}"[:600]


@contextmanager
def _quiet() -> Iterator[Any]:
    """A file for the answers in place of stdout; what DeepSpeed prints is thrown away."""
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    with answers:
        yield answers


def main() -> None:
    """Answer all cases."""
    cases = json.load(sys.stdin)
    with _quiet() as answers:
        for name in _PRELOADED:
            with suppress(ImportError):  # of another version, where it is imported when it is needed
                import_module(name)
        for case in cases:
            try:
                verdict = answer(case)
            except Exception as error:
                verdict = {"refused": False, "reason": f"the dry run failed: {_short(error)}"}
            answers.write(json.dumps(verdict) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
