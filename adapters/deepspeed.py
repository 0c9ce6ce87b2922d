"""A user's DeepSpeed JSON: what it says about the job, and the same file with a plan written into it.

Everything a plan does not decide is kept as it is. What DeepSpeed accepts follows DeepSpeed 0.19.8
(``runtime/config.py``, ``runtime/zero/config.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniap_tune.errors import InputError
from uniap_tune.spec import DType, OptimizerName, Precision

from .documents import printable

AUTO = "auto"  # a value that the Trainer of transformers fills in from its own arguments
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

_LARGEST_FILE = 4 << 20
_TUNING_KEYS = ("autotuning", "uniap")  # they address the tuner; DeepSpeed would start its own for the first

# ``zero_optimization`` keys that only some ZeRO stages have; at others DeepSpeed refuses them or ignores them silently.
_STAGES_OF_KEY: Mapping[str, frozenset[int]] = {
    "offload_param": frozenset({3}),
    "cpu_offload_param": frozenset({3}),
    "offload_optimizer": frozenset({1, 2, 3}),
    "cpu_offload": frozenset({1, 2, 3}),
    "zero_hpz_partition_size": frozenset({3}),
    "zero_quantized_weights": frozenset({3}),
    "zero_quantized_nontrainable_weights": frozenset({3}),
    "zero_quantized_gradients": frozenset({3}),
    "compute_grad_norm": frozenset({1, 2}),
}

_OPTIMIZERS = {
    OptimizerName.ADAM: ("adam", "adamw", "fusedadam", "lamb", "onebitadam", "zerooneadam", "onebitlamb"),
    OptimizerName.SGD: ("sgd", "lion", "muon"),
}

_BUCKET = "reduce_bucket_size"

# Types that ZeRO takes only with zero_allow_untested_optimizer (runtime/engine.py:2299), and those not known to run so.
UNTESTED_WITH_ZERO = frozenset({"sgd", "lamb"})
_WITHOUT_ZERO = frozenset({"onebitadam", "zerooneadam", "onebitlamb"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One key that differs; a side is ``None`` in text form when the key is absent there."""

    key: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before is None:
            return f"+ {self.key}: {self.after}"
        if self.after is None:
            return f"- {self.key}: {self.before}"
        return f"~ {self.key}: {self.before} -> {self.after}"


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a DeepSpeed configuration file.

    Raises:
        InputError: missing, unreadable, too large, not JSON, not an object, or with a key twice.
    """
    where = printable(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{where}: cannot be read", why=why or "", fix="give the DeepSpeed JSON's path") from None
    if len(data) > _LARGEST_FILE:
        raise InputError(f"{where}: larger than {_LARGEST_FILE >> 20} MiB", fix="give a DeepSpeed JSON")
    try:
        values = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON", why=str(error)[:200], fix="correct the file") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: not a JSON object", fix="give a DeepSpeed configuration")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def section(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The object under ``key``, empty when absent or null.

    Raises:
        InputError: it is something else.
    """
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key} must be an object, not {json.dumps(value)[:60]}", fix="correct it")
    return value


def whole(values: Mapping[str, Any], key: str, where: str) -> int | None:
    """A whole number above zero; ``None`` when absent or ``"auto"``.

    Raises:
        InputError: it is something else.
    """
    value = values.get(key)
    if value is None or value == AUTO:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InputError(f"{where}: {key} must be a whole number above zero, not {json.dumps(value)[:60]}")
    return value


def global_batch(values: Mapping[str, Any], where: str, world_size: int) -> int | None:
    """Samples of a step; ``None`` when the JSON does not say.

    Without ``train_batch_size`` it is micro-batch x accumulation x data-parallel ranks, which are all ranks but those
    that ``tensor_parallel.autotp_size`` takes.
    """
    total = whole(values, "train_batch_size", where)
    tensor = max(whole(_enabled_tensor(values, where), "autotp_size", where) or 1, 1)
    if total is not None:
        return total // tensor  # DeepSpeed counts tensor-parallel ranks as if they read different samples
    micro = whole(values, "train_micro_batch_size_per_gpu", where)
    if micro is None:
        return None
    steps = whole(values, "gradient_accumulation_steps", where)
    if steps is None and values.get("gradient_accumulation_steps") == AUTO:
        return None
    return micro * (steps or 1) * max(world_size // tensor, 1)


def _enabled_tensor(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    tensor = section(values, "tensor_parallel", where)
    return tensor if tensor.get("autotp_size") else {}


def precision(values: Mapping[str, Any], where: str) -> Precision | None:
    """Number formats of training; ``None`` when they are left to the Trainer's arguments (``"auto"``)."""
    flags = {name: section(values, name, where).get("enabled", False) for name in ("bf16", "bfloat16", "fp16")}
    gradients = 4 if section(values, "data_types", where).get("grad_accum_dtype") == "fp32" else None
    if flags["bf16"] is True or flags["bfloat16"] is True:
        return Precision(compute=DType.BF16, gradient_bytes=gradients)
    if flags["fp16"] is True:
        return Precision(compute=DType.FP16, gradient_bytes=gradients)
    if AUTO in flags.values():
        return None
    return Precision(compute=DType.FP32)


def optimizer(values: Mapping[str, Any], where: str) -> OptimizerName:
    """The kind of optimizer, by the states it keeps; Adam when the script brings its own.

    Raises:
        InputError: an optimizer whose states are not known.
    """
    kind = section(values, "optimizer", where).get("type", "adam")
    for name, types in _OPTIMIZERS.items():
        if isinstance(kind, str) and kind.lower() in types:
            return name
    known = ", ".join(sorted(kind for kinds in _OPTIMIZERS.values() for kind in kinds))
    raise InputError(
        f"{where}: optimizer.type {json.dumps(kind)[:60]} is not known",
        why=f"its memory must be counted; known types: {known}",
        fix="use one of these",
    )


def optimizer_type(values: Mapping[str, Any]) -> str:
    """The optimizer it names, in lower case; empty: the script brings it."""
    named = values.get("optimizer")
    kind = named.get("type") if isinstance(named, dict) else None
    return kind.lower() if isinstance(kind, str) else ""


def forbidden_zero(values: Mapping[str, Any]) -> frozenset[int]:
    """ZeRO stages that other keys of this JSON rule out, as DeepSpeed's ``_do_error_check`` does."""
    ruled_out: set[int] = set()
    if str(values.get("gradient_allreduce_op", "")).lower() == "sum":
        ruled_out.add(3)
    for name in ("bf16", "bfloat16", "fp16"):
        flags = values.get(name)
        if isinstance(flags, dict) and any(
            flags.get(key) for key in ("fp16_master_weights_and_grads", "bf16_master_weights_and_grads")
        ):
            ruled_out.add(0)
    zero = values.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("zenflow"):
        ruled_out.add(0)
    if optimizer_type(values) in _WITHOUT_ZERO:
        ruled_out |= {1, 2, 3}
    return frozenset(ruled_out)


def rewrite(values: Mapping[str, Any], planned: Mapping[str, Any], *, trainer: bool = False) -> dict[str, Any]:
    """The user's configuration with a plan written into it.

    Args:
        values: the user's JSON.
        planned: the plan as DeepSpeed JSON, from :func:`uniap_tune.render.deepspeed.deepspeed_config`.
        trainer: the script uses transformers' Trainer, where ``"auto"`` values stay so and agree with the command's
            arguments.

    The sections that address the tuner are taken out. Precision, optimizer, scheduler, clipping and whatever else a
    plan does not decide stay as they are.
    """
    result = {key: deepcopy(value) for key, value in values.items() if key not in _TUNING_KEYS}
    _write_batch(result, planned, trainer)
    result["zero_optimization"] = _zero(result.get("zero_optimization"), planned["zero_optimization"], trainer)
    untested = planned["zero_optimization"]["stage"] and optimizer_type(values) in UNTESTED_WITH_ZERO
    if untested or "zero_allow_untested_optimizer" in planned:
        result["zero_allow_untested_optimizer"] = True
    tensor = planned.get("tensor_parallel", {}).get("autotp_size", 0)
    if tensor or (result.get("tensor_parallel") or {}).get("autotp_size"):
        result["tensor_parallel"] = {**(result.get("tensor_parallel") or {}), "autotp_size": tensor}
    if "pipeline" in planned:
        own = result.get("pipeline")
        result["pipeline"] = {**(own if isinstance(own, dict) else {}), **planned["pipeline"]}
    return result


def _write_batch(result: dict[str, Any], planned: Mapping[str, Any], trainer: bool) -> None:
    for key in BATCH_KEYS:
        auto = trainer and result.get(key, AUTO) == AUTO
        if auto:
            result[key] = AUTO
        elif key in planned:
            result[key] = planned[key]
        else:  # with tensor parallelism DeepSpeed's own rule for the sum does not hold
            result.pop(key, None)


def _zero(own: Any, planned: Mapping[str, Any], trainer: bool) -> dict[str, Any]:
    stage = planned["stage"]
    kept = own if isinstance(own, dict) else {}  # true and false are an old way to write stages 1 and 0
    result = {key: value for key, value in kept.items() if stage in _STAGES_OF_KEY.get(key, (stage,))}
    offload = result.get("offload_optimizer")
    if stage < 3 and isinstance(offload, dict) and "ratio" in offload:  # partial offloading is ZeRO-3's
        result["offload_optimizer"] = {key: value for key, value in offload.items() if key != "ratio"}
    result["stage"] = stage
    for key, value in planned.items():
        if result.get(key) == AUTO and not trainer:
            result[key] = value
        result.setdefault(key, value)
    own_bucket, bucket = result.get(_BUCKET), planned.get(_BUCKET)
    if bucket is not None and isinstance(own_bucket, int | float) and own_bucket > bucket:
        result[_BUCKET] = bucket  # buffers of gigabytes, which the plan does not count
    return result


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Change, ...]:
    """The keys that differ, with dots between levels, in the order of the files."""
    return tuple(_differences(before, after, ""))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[Change]:
    for key in dict.fromkeys([*before, *after]):
        name = prefix + key
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{name}.")
        elif key not in before or key not in after or old != new or type(old) is not type(new):
            yield Change(key=name, before=_text(before, key), after=_text(after, key))


def _text(values: Mapping[str, Any], key: str) -> str | None:
    return json.dumps(values[key]) if key in values else None
