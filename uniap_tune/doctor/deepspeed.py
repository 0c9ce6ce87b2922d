"""A DeepSpeed JSON with what its script trains, as a :class:`~uniap_tune.doctor.setup.Setup`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from uniap_tune.accumulation import zero_refusal
from uniap_tune.adapters import deepspeed as ds_json
from uniap_tune.autotp import tensor_refusal
from uniap_tune.cost.runtime import default_runtime, gradient_bucket
from uniap_tune.deepspeed.check import Case as DeepSpeedCase
from uniap_tune.deepspeed.check import broken_rule, tensor_size
from uniap_tune.doctor.setup import SETTINGS, Option
from uniap_tune.graph import build_graph
from uniap_tune.predict import Layers, Run, grouped, uniform_chunks
from uniap_tune.spec import Cluster, Job, Model, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target

_BATCH = "train_micro_batch_size_per_gpu"
_STEPS = "gradient_accumulation_steps"
_TOTAL = "train_batch_size"
_BUCKET = 500_000_000  # runtime/zero/config.py, reduce_bucket_size
_STAGE_3_KEYS = ("offload_param", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedSetup:
    """A DeepSpeed JSON on a cluster.

    Attributes:
        name, format: what was read.
        values: the JSON.
        micro_batch: samples of a micro-batch on one data-parallel rank.
        pp: pipeline stages, 1 without a ``PipelineModule``.
        parts: bounds of the stages in the layers, embedding and head counted; empty: even.
        recompute: whether the script checkpoints every block.
        notes: what was assumed.
    """

    name: str
    format: str
    model: Model
    cluster: Cluster
    job: Job
    values: Mapping[str, Any]
    micro_batch: int
    pp: int = 1
    parts: tuple[int, ...] = ()
    recompute: bool = False
    notes: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        """Who runs it."""
        return "DeepSpeed"

    @property
    def zero_section(self) -> Mapping[str, Any]:
        """The ``zero_optimization`` object; ``true`` is an old way to write stage 1."""
        section = self.values.get("zero_optimization")
        if section is True:
            return {"stage": 1}
        return section if isinstance(section, dict) else {}

    @property
    def zero(self) -> int:
        """The ZeRO stage."""
        stage = self.zero_section.get("stage", 0)
        return stage if isinstance(stage, int) and 0 <= stage <= 3 else 0

    @property
    def tp(self) -> int:
        """The degree of automatic tensor parallelism."""
        return tensor_size(self.values)

    @property
    def dp(self) -> int:
        """Data-parallel ranks, rounded down."""
        return max(1, self.cluster.num_devices // (self.tp * self.pp))

    @property
    def microbatches(self) -> int:
        """Micro-batches of a step, rounded down."""
        return self.job.global_batch // (self.micro_batch * self.dp)

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced behind the backward pass: asked for, or the default of ZeRO 3. Without ZeRO and
        in a pipeline the key means nothing, because the engine never does."""
        given = self.zero_section.get("overlap_comm")
        if self.pp > 1 or self.zero == 0:
            return True
        return bool(given) if given is not None else self.zero == 3

    @property
    def _scatters(self) -> bool:
        """Whether ZeRO 1 and 2 send a gradient only to the rank that keeps it, instead of reducing it for all."""
        section = self.zero_section
        return section.get("use_multi_rank_bucket_allreduce") is False and section.get("reduce_scatter") is not False

    @property
    def _bucket(self) -> int:
        """Elements of a buffer of gradients, as plans have it where there is no file; the Trainer makes ``"auto"`` a
        matrix of the hidden width."""
        default = gradient_bucket(self.model) if self.format == SETTINGS else _BUCKET
        given = self.zero_section.get("reduce_bucket_size", default)
        return int(given) if isinstance(given, int | float) else self.model.hidden_size**2

    @property
    def offloads(self) -> tuple[str, ...]:
        """The offload sections that are on."""
        found = []
        for key in ("offload_optimizer", "offload_param"):
            section = self.zero_section.get(key)
            if isinstance(section, dict) and section.get("device", "none") != "none":
                found.append(key)
        return tuple(found)

    @property
    def broken(self) -> tuple[tuple[str, str], ...]:
        """What DeepSpeed refuses, or accepts and does not do."""
        found: list[tuple[str, str]] = []
        world, strategy = self.cluster.num_devices, self.tp * self.pp
        parts = self.parts or ((0,) * self.pp + (self.model.num_layers + 2,) if self.pp > 1 else ())
        layers = self.model.num_layers + 2
        case = DeepSpeedCase(config=self.values, world_size=world, layers=layers, parts=parts)
        reason = broken_rule(case) or tensor_refusal(self.model, self.tp)
        if reason:
            found.append(("deepspeed_rule", reason))
        found += self._refused_values
        if world % strategy:
            return tuple(found)  # that is the reason; nothing else can be said about a grid that is none
        samples = self.micro_batch * self.dp
        if self.job.global_batch % samples:
            text = f"a batch of {self.job.global_batch} is no multiple of micro-batch x dp = {samples}"
            found.append(("batch_divides", f"{text} (DeepSpeed refuses it; runtime/config.py)"))
        if self.pp > 1 and self.zero > 1:
            found.append(("zero_in_pipeline", "pipelines run with ZeRO 0 or 1 only (pipe/engine.py:76)"))
        tied = self.model.tied_embeddings and self.pp > 1
        if reason := zero_refusal(self.job, CAPABILITIES[Target.DEEPSPEED], self.zero, tied_pipeline=tied):
            found.append(("gradient_dtype", reason))
        if self.pp > layers:
            found.append(("enough_layers", f"{self.pp} stages are too many for {self.model.num_layers} layers"))
        return tuple(found)

    @property
    def _refused_values(self) -> Iterator[tuple[str, str]]:
        """Values that DeepSpeed refuses wherever it runs."""
        stage = self.zero_section.get("stage", 0)
        if isinstance(stage, int) and not 0 <= stage <= 3:
            yield "zero_stage", f"zero_optimization.stage is {stage}, and DeepSpeed has 0 to 3"
        both = [self.values.get(name) for name in ("bf16", "fp16")]
        if all(isinstance(section, dict) and section.get("enabled") is True for section in both):
            yield "precision", "bf16 and fp16 are both enabled, which DeepSpeed refuses (runtime/config.py)"
        total, micro, steps = (self.values.get(key) for key in (_TOTAL, _BATCH, _STEPS))
        if isinstance(total, int) and isinstance(micro, int) and isinstance(steps, int):
            ranks = self.cluster.num_devices // self.pp
            if total != micro * steps * ranks:
                text = f"{_TOTAL} {total} is not micro-batch {micro} x accumulation {steps} x {ranks} ranks"
                yield "batch_product", f"{text} (DeepSpeed refuses it; runtime/config.py)"

    @property
    def runs(self) -> bool:
        """Whether it can be priced: everything that breaks a rule is refused or does something else."""
        return not self.broken and self.microbatches > 0

    @property
    def settings(self) -> Mapping[str, str]:
        """Its parallel settings."""
        found = {"pp": str(self.pp), "tp": str(self.tp), "dp": str(self.dp), "zero": str(self.zero)}
        found |= {"micro-batch": str(self.micro_batch), "micro-batches": str(self.microbatches)}
        found["recompute"] = "full" if self.recompute else "none"
        found["overlap"] = "on" if self.overlaps else "off"
        found["offload"] = ", ".join(key.removeprefix("offload_") for key in self.offloads) or "none"
        return found

    def run(self) -> Run:
        """What it runs. Offloaded optimizer states take no memory of the device; moving them is not priced."""
        mode = Recompute.FULL if self.recompute else Recompute.NONE
        strategy = Strategy(tp=self.tp, dp=self.dp, zero=self.zero, recompute=mode)
        job = self.job
        if "offload_optimizer" in self.offloads:
            job = replace(job, optimizer_state_bytes=0, precision=replace(job.precision, master_weights=False))
            # the host has the gradients too, but for those that ZeRO-2 accumulates in fp32 (zero/stage_1_and_2.py)
            if self.zero == 3 or (self.zero == 2 and job.precision.gradient_bytes != 4):
                job = replace(job, precision=replace(job.precision, gradient_bytes=0))
        capabilities = replace(
            CAPABILITIES[Target.DEEPSPEED],
            overlap_gradient_reduce=self.overlaps,
            scatters_gradients=self._scatters,
        )
        return Run(
            id=self.name,
            model=self.model,
            cluster=self.cluster,
            job=job,
            capabilities=capabilities,
            runtime=replace(default_runtime(capabilities, self.model, self.cluster), gradient_bucket=self._bucket),
            pp=self.pp,
            chunks=self._chunks(strategy),
            micro_batch=self.micro_batch * self.dp,
            num_microbatches=self.microbatches,
        )

    def _chunks(self, strategy: Strategy) -> tuple[tuple[Layers, ...], ...]:
        types = [layer.type for layer in build_graph(self.model).layers]
        if not self.parts:
            return uniform_chunks(types, strategy, self.pp, 1)
        bounds = zip(self.parts, self.parts[1:], strict=False)
        return tuple(grouped(types[first:last], strategy) for first, last in bounds)

    # -- changes ------------------------------------------------------------------------------------------------------

    def _edited(self, setting: str, changes: Mapping[str, Any], **fields: Any) -> Option:
        """The option of other values at dotted keys; ``None`` takes a key out."""
        values = deepcopy(dict(self.values))
        if values.get("zero_optimization") is True:
            values["zero_optimization"] = dict(self.zero_section)
        edits = []
        for key, value in changes.items():
            *outer, last = key.split(".")
            section = values
            for part in outer:
                section[part] = dict(section.get(part) or {})
                section = section[part]
            if value is None:
                if last in section:
                    edits.append(f"without {key}")
                section.pop(last, None)
            elif section.get(last) != value:
                edits.append(f"{key} = {str(value).lower()}")
                section[last] = value
        return Option(setting=setting, edits=tuple(edits), setup=replace(self, values=values, **fields))

    def with_stage(self, stage: int) -> Option:
        """The option of another ZeRO stage, without what only others have."""
        changes: dict[str, Any] = {"zero_optimization.stage": stage}
        if stage < 3:
            changes |= {f"zero_optimization.{key}": None for key in _STAGE_3_KEYS}
            if isinstance(self.zero_section.get("offload_optimizer"), dict):
                changes["zero_optimization.offload_optimizer.ratio"] = None
        if stage in (0, 3):
            changes["zero_optimization.compute_grad_norm"] = None
        if stage == 0:
            changes["zero_optimization.offload_optimizer"] = None
        elif ds_json.optimizer_type(self.values) in ds_json.UNTESTED_WITH_ZERO:
            changes["zero_allow_untested_optimizer"] = True
        return self._edited("zero", changes)

    def with_stages(self, pp: int) -> Option:
        """The option of other stages; the accumulation follows where the JSON says it."""
        other = replace(self, pp=pp, parts=())
        steps = max(1, self.job.global_batch // (self.micro_batch * other.dp))
        option = other._edited("pp/dp", {_STEPS: steps} if isinstance(self.values.get(_STEPS), int) else {})
        return replace(option, edits=(f"PipelineModule(num_stages={pp})", *option.edits))

    def with_micro_batch(self, size: int) -> Option:
        """The option of another micro-batch; the accumulation follows."""
        steps = self.job.global_batch // (size * self.dp)
        return self._edited("micro-batch", {_BATCH: size, _STEPS: max(1, steps)}, micro_batch=size)

    def with_recompute(self, on: bool) -> Option:
        """The option of checkpointing every block, or none."""
        if self.pp > 1:
            key = "pipeline.activation_checkpoint_interval"
            option = self._edited("recompute", {key: int(on)}, recompute=on)
            return replace(option, edits=option.edits or (f"{key} = {int(on)}",))
        word = "model.gradient_checkpointing_enable()" if on else "no gradient checkpointing"
        return Option(setting="recompute", edits=(f"in the script: {word}",), setup=replace(self, recompute=on))

    def with_overlap(self) -> Option:
        """The option of reducing gradients behind the backward pass."""
        return self._edited("overlap", {"zero_optimization.overlap_comm": True})

    def without_offload(self) -> Option:
        """The option of keeping everything on the devices."""
        return self._edited("offload", {f"zero_optimization.{key}": None for key in self.offloads})

    def with_tensor(self, tp: int) -> Option:
        """The option of another tensor-parallel degree; the accumulation follows."""
        samples = self.job.global_batch // max(1, self.cluster.num_devices // tp)
        changes: dict[str, Any] = {"tensor_parallel.autotp_size": tp, _STEPS: max(1, samples // self.micro_batch)}
        if tp > 1:  # DeepSpeed compares it as if tensor-parallel ranks read different samples
            changes[_TOTAL] = None
        return self._edited("tp/dp", changes)
