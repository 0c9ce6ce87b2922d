"""Measurement records: one JSON object a line, as in published throughput tables, into runs to predict.

The fields are listed in ``docs/reference/records.md``. What a record leaves out is assumed, and said so in
``Run.assumptions``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from uniap_tune.accuracy import Measured, memory_error
from uniap_tune.cost.runtime import CORE_ATTENTION, RECOMPUTE_MODULES
from uniap_tune.errors import InputError, TuneError
from uniap_tune.predict import Prediction, Run
from uniap_tune.spec import DType, Job, Model, Precision, Recompute
from uniap_tune.strategy import Strategy
from uniap_tune.weights import parameter_count

from .record_cluster import read_record_cluster
from .record_fields import Fields, SkippedRecordError, count, flag, mapping, names, required, text
from .record_fit import as_configured, as_it_ran, recomputed_to_fit, states_no_recomputation
from .record_layout import laid_out
from .record_measured import read_measured
from .record_megatron import leading_recompute, read_megatron_run
from .record_model import read_record_model
from .record_software import Engine, Software, read_capabilities, read_runtime, read_software
from .record_stages import is_staged, staged_chunks

_FORMATS = {
    "fp32": DType.FP32, "fp16": DType.FP16, "bf16": DType.BF16, "fp8": DType.FP8, "fp8-cs": DType.FP8,
    "fp8-ds": DType.FP8, "fp8-sc": DType.FP8, "fp8-mx": DType.MXFP8, "mxfp8": DType.MXFP8, "nvfp4": DType.NVFP4,
}  # fmt: skip
_UNSUPPORTED_TASKS = ("lora", "peft", "qlora")
_MAX_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class RecordLine:
    """One input line: its number from 0, and its JSON object, or why there is none."""

    line: int
    record: Fields | None
    problem: str = ""

    @property
    def id(self) -> str:
        """The record's ``id``, or ``test`` where it has none."""
        return text(self.record or {}, "id", "test")


def read_lines(path: Path) -> Iterator[RecordLine]:
    """The records of a JSON-lines file; lines that hold no object come with the reason.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for index, raw in enumerate(file):
                if raw.strip():
                    yield _parse(index, raw)
    except OSError as error:
        raise InputError(f"{path}: cannot be read", why=error.strerror or "", fix="give a JSON-lines file") from None


def _parse(index: int, raw: bytes) -> RecordLine:
    if len(raw) > _MAX_LINE:
        return RecordLine(index, None, f"line is longer than {_MAX_LINE} bytes")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return RecordLine(index, None, f"not JSON: {str(error)[:100]}")
    if not isinstance(record, dict):
        return RecordLine(index, None, "not a JSON object")
    return RecordLine(index, record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One line, read and predicted; or the reason why not."""

    line: int
    id: str
    run: Run | None = None
    measured: Measured | None = None
    prediction: Prediction | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, object]:
        """For JSON: prediction, and errors where the record says what was measured."""
        result: dict[str, object] = {"line": self.line, "id": self.id}
        prediction, measured = self.prediction, self.measured
        if prediction is None:
            return {**result, "skipped": self.reason}
        result.update(asdict(prediction))
        if measured is not None and measured.step_time_s is not None:
            result["step_time_error"] = prediction.step_time_s / measured.step_time_s - 1
        if measured is not None and measured.peak_bytes is not None:
            result["peak_memory_error"] = memory_error(prediction.peak_memory_bytes, measured.peak_bytes)
        return result


def evaluate_file(path: Path) -> Iterator[Evaluated]:
    """Every record of a file with its prediction, in order.

    Raises:
        InputError: the file cannot be read.
    """
    return (evaluate(line) for line in read_lines(path))


def evaluate(line: RecordLine) -> Evaluated:
    """Reads and predicts one record; its faults become the reason for skipping it."""
    if line.record is None:
        return Evaluated(line=line.line, id=line.id, reason=line.problem)
    try:
        run = read_run(line.record)
        measured = read_measured(line.record, run)
        run, prediction = as_it_ran(run, measured)
        if not prediction.fits and states_no_recomputation(line.record):
            run, prediction = recomputed_to_fit(run, prediction)
        return Evaluated(line=line.line, id=line.id, run=run, measured=measured, prediction=prediction)
    except TuneError as error:
        return Evaluated(line=line.line, id=line.id, reason=error.what)


def read_run(record: Fields) -> Run:
    """The run that a record describes.

    Raises:
        SkippedRecordError: no model, an unknown GPU, or a job the cost model does not cover.
        InputError: a field is wrong.
    """
    task = text(record, "task").lower()
    if any(word in task for word in _UNSUPPORTED_TASKS):
        raise SkippedRecordError(f"{task} trains adapters, not the model", fix="give records of full training")
    if count(record, "num_gpus") is None and mapping(record, "args") is None:
        raise SkippedRecordError("record has no num_gpus", fix="add num_gpus")
    if mapping(record, "args") is not None:
        return read_megatron_run(record)
    return _Reader(record).run()


class _Reader:
    """Collects the parts of one record's run and the assumptions made on the way."""

    def __init__(self, record: Fields) -> None:
        self._record = record
        self._settings = mapping(record, "settings") or {}
        self._assumptions: list[str] = []
        self._exact = True

    def run(self) -> Run:
        record = self._record
        dtype = self._dtype()
        software = read_software(record, dtype)
        parsed = read_record_model(record, dropout=self._dropout(software))
        self._assumptions += parsed.assumptions
        num_gpus = required(record, "num_gpus")
        cluster = read_record_cluster(record, num_gpus)
        flash = flag(record, "flash_attn")
        if flash is None:
            flash = not software.old
            usual = "before 2023" if software.old else f"in {dtype} training"
            self._assumptions.append(f"{'with' if flash else 'without'} FlashAttention, as usual {usual}")
        staged = staged_chunks(record, parsed.model)
        narrow = software.recipes and not software.old
        job = Job(
            global_batch=self._global_batch(),
            seq_length=parsed.seq_length,
            encoder_seq_length=parsed.encoder_seq_length,
            precision=Precision(compute=dtype, gradient_bytes=2 if narrow else None),
            optimizer_state_bytes=self._optimizer_states(parsed.model) if narrow else None,
            flash_attention=flash,
        )
        run = Run(
            id=text(record, "id", "test"),
            model=parsed.model,
            cluster=cluster,
            job=job,
            capabilities=read_capabilities(record, software),
            runtime=read_runtime(record, software, parsed.model),
            pp=1,
            chunks=(),
            micro_batch=1,
            num_microbatches=1,
        )
        if staged is not None:
            if staged.assumption:
                self._assume(staged.assumption)
            run = replace(
                run,
                pp=staged.pp,
                chunks=staged.chunks,
                micro_batch=staged.micro_batch,
                num_microbatches=max(1, job.global_batch // staged.micro_batch),
            )
        else:
            run = self._uniform(run, num_gpus, software)
            run = replace(run, offloaded_layers=count(self._settings, "cpu_offloading_num_layers", least=0) or 0)
        return as_configured(record, replace(run, exact=self._exact, assumptions=tuple(self._assumptions)))

    def _optimizer_states(self, model: Model) -> int | None:
        """Bytes of Adam's moments in Megatron-Bridge's recipes: bf16 for DeepSeek's models, as those were trained
        (arXiv 2412.19437 section 3.3.2; megatron/bridge/recipes/deepseek)."""
        if model.mla is None:
            return None
        self._assumptions.append("moments in bf16, as in Megatron-Bridge's recipes for DeepSeek")
        return 4

    def _dropout(self, software: Software) -> float:
        """GPT pre-training before 2023 used 0.1 (Megatron's default); planners' benchmarks, with their stages, none."""
        if not software.old or is_staged(self._record):
            return 0.0
        self._assumptions.append("dropout 0.1 where the model is a GPT")
        return 0.1

    def _uniform(self, run: Run, num_gpus: int, software: Software) -> Run:
        """One strategy for all layers, from the record's degrees."""
        record = self._record
        tp, pp, cp = (self._degree(key) for key in ("tp", "pp", "cp"))
        ep = count(record, "ep") or 1
        dp = count(record, "dp") or max(1, num_gpus // (tp * pp * cp))
        if tp * pp * cp * dp != num_gpus:
            raise InputError(
                f"record's tp({tp}) * pp({pp}) * cp({cp}) * dp({dp}) != num_gpus({num_gpus})",
                fix="correct the degrees or num_gpus",
            )
        if run.model.num_layers + 2 < pp:
            raise InputError(f"record has {pp} stages for {run.model.num_layers} layers", fix="correct pp")
        micro_batch_size = count(record, "mbs")
        if micro_batch_size is None:
            micro_batch_size = 1
            self._assume("micro-batch size taken as 1")
        recompute, leading = self._recompute()
        if recompute is Recompute.SELECTIVE:
            run = replace(run, runtime=replace(run.runtime, recompute_modules=self._recompute_modules()))
        sequence = flag(record, "sequence_parallel")
        usual = not software.old and software.engine is not Engine.TRANSFORMERS
        strategy = Strategy(
            tp=tp,
            cp=cp,
            dp=dp,
            ep=ep,
            etp=self._expert_tensor_parallel(tp, ep),
            zero=self._zero(software),
            recompute=recompute,
            sequence_parallel=tp > 1 and (usual if sequence is None else sequence),
        )
        strategy = self._sharded(run, strategy, pp)
        virtual = self._virtual_stages(pp, run.model.num_layers, recipes=software.recipes)
        chunks = laid_out(text(self._settings, "pp_layout"), run.model, strategy, pp, virtual)
        if leading is not None:
            chunks = tuple(leading_recompute(chunk, leading) for chunk in chunks)
        micro_batch = micro_batch_size * dp
        return replace(
            run,
            pp=pp,
            chunks=chunks,
            micro_batch=micro_batch,
            num_microbatches=max(1, run.job.global_batch // micro_batch),
        )

    def _sharded(self, run: Run, strategy: Strategy, pp: int) -> Strategy:
        """A run whose parameters and gradients alone exceed the memory must have sharded them."""
        state = run.job.precision.param_bytes + 4
        held = state * parameter_count(run.model) / (strategy.tp * pp * strategy.ep)
        if strategy.zero >= 3 or pp > 1 or strategy.dp == 1 or held < run.cluster.device.memory_bytes:
            return strategy
        self._assume("parameters sharded (FSDP): unsharded they exceed the memory")
        return replace(strategy, zero=3)

    def _degree(self, key: str) -> int:
        value = count(self._record, key)
        if value is None:
            self._assumptions.append(f"{key} taken as 1")
            return 1
        return value

    def _assume(self, what: str) -> None:
        """An assumption that can change the answer much: such records are scored apart."""
        self._assumptions.append(what)
        self._exact = False

    def _global_batch(self) -> int:
        batch = count(self._record, "gbs", "global_batch")
        if batch is not None:
            return batch
        self._assume("global batch taken as one sample a replica")
        return count(self._record, "dp") or 1

    def _dtype(self) -> DType:
        name = text(self._record, "precision").lower().split(" ")[0]
        if not name:
            self._assumptions.append("precision taken as bf16")
            return DType.BF16
        if name not in _FORMATS:
            raise SkippedRecordError(f"unknown precision {name[:20]!r}", fix=f"one of {', '.join(_FORMATS)}")
        return _FORMATS[name]

    def _zero(self, software: Software) -> int:
        zero = count(self._record, "zero", least=0)
        if zero is None:
            zero = 0 if software.old else 1
            self._assumptions.append(f"ZeRO stage taken as {zero}")
        if (count(self._record, "fsdp", least=0) or 0) > 1 or flag(self._settings, "use_megatron_fsdp"):
            return 3
        return min(zero, 3)

    def _virtual_stages(self, pp: int, num_layers: int, *, recipes: bool) -> int:
        """The record's vp, where it divides the layers (with embedding and head, if need be); where its source leaves
        it out, that of NVIDIA's recipes, of which GPT-3 and Llama-2 have 1 or 2 layers in a chunk, Llama-3 4."""
        virtual = count(self._record, "vp", "virtual_stages")
        if virtual is None and "vp" in self._missing() and recipes and pp > 1 and num_layers % pp == 0:
            self._assume("virtual stages of one layer: its source does not state them, and NVIDIA's recipes interleave")
            return num_layers // pp
        if virtual is None or pp == 1:
            return 1
        parts = pp * virtual
        if parts > num_layers + 2:
            raise InputError(f"record has {parts} virtual stages for {num_layers} layers", fix="correct pp or vp")
        return virtual

    def _missing(self) -> list[str]:
        """Fields that the record says its source leaves out."""
        missing = self._record.get("missing")
        return names(missing) if isinstance(missing, list) else []

    def _recompute(self) -> tuple[Recompute, int | None]:
        """The mode, and the number of leading layers of a chunk it applies to (``None``: all)."""
        value = self._record.get("recompute")
        if value is None:
            self._assume("no recomputation")
            return Recompute.NONE, None
        name = str(value).lower()
        if name.startswith("full"):
            block = re.match(r"full/block/(\d+)", name)
            return Recompute.FULL, int(block.group(1)) if block else None
        if name.startswith("selective"):
            return Recompute.SELECTIVE, None
        return Recompute.NONE, None

    def _recompute_modules(self) -> frozenset[str]:
        """What selective recomputation repeats: the modules it names, else the attention core."""
        words = set(re.findall(r"\w+", str(self._record.get("recompute")).lower())) - {"selective"}
        if "attention" in words or not words:
            words = (words - {"attention"}) | {CORE_ATTENTION}
        unknown = sorted(words - RECOMPUTE_MODULES)
        if unknown:
            self._assumptions.append(f"unknown module {unknown[0][:30]} is not recomputed")
        return frozenset(words & RECOMPUTE_MODULES)

    def _expert_tensor_parallel(self, tp: int, ep: int) -> int:
        etp = count(self._settings, "expert_tensor_parallel_size")
        return etp or (tp if ep == 1 else 1)
