"""What a record leaves out about its memory, chosen so that the run fits."""

from __future__ import annotations

from dataclasses import replace

from uniap_tune.accuracy import Measured
from uniap_tune.graph import build_graph
from uniap_tune.predict import Prediction, Run, predict, uniform_chunks
from uniap_tune.spec import Recompute
from uniap_tune.strategy import Strategy

from .record_fields import Fields, mapping, text
from .record_megatron import full_recompute, leading_recompute
from .record_stages import is_staged


def as_it_ran(run: Run, measured: Measured) -> tuple[Run, Prediction]:
    """The prediction of a run. One that was measured did fit: where fp32 gradients do not, it had 16-bit ones."""
    prediction = predict(run)
    precision = run.job.precision
    if prediction.fits or measured.step_time_s is None or precision.gradient_bytes is not None:
        return run, prediction
    narrow = replace(
        run,
        job=replace(run.job, precision=replace(precision, gradient_bytes=2)),
        assumptions=(*run.assumptions, "16-bit gradients: with fp32 ones it would not have fit"),
    )
    again = predict(narrow)
    return (narrow, again) if again.fits else (run, prediction)


def as_configured(record: Fields, run: Run) -> Run:
    """The run without recomputation that only a configuration file states ("full (config ...)") and its model does
    not need: one micro-batch of the whole model fits one GPU without it. All runs of a model are thus read alike,
    as one script ran them."""
    if "(config" not in text(record, "recompute").lower() or is_staged(record):
        return run
    strategy = run.chunks[0][0].strategy
    samples = max(1, run.micro_batch // strategy.dp)
    alone = replace(
        run,
        chunks=uniform_chunks([layer.type for layer in build_graph(run.model).layers], Strategy(), 1, 1),
        pp=1,
        micro_batch=samples,
        num_microbatches=1,
    )
    if not predict(alone).fits:
        return run
    plain = tuple(
        tuple(replace(part, strategy=replace(part.strategy, recompute=Recompute.NONE)) for part in chunk)
        for chunk in run.chunks
    )
    note = "no recomputation: only a configuration file states it, and the model fits one GPU without"
    return replace(run, chunks=plain, assumptions=(*run.assumptions, note))


def states_no_recomputation(record: Fields) -> bool:
    """Whether the record leaves recomputation, and with it most of its memory, to be assumed."""
    return record.get("recompute") is None and not is_staged(record) and mapping(record, "args") is None


def recomputed_to_fit(run: Run, prediction: Prediction) -> tuple[Run, Prediction]:
    """The run with as few leading layers of each chunk recomputed as fit the memory; as it was if all do not."""
    blocks = max(int(sum(part.count for part in chunk)) for chunk in run.chunks)
    fewest, most = 1, blocks
    found: tuple[Run, Prediction] | None = None
    while fewest <= most:
        leading = (fewest + most) // 2
        candidate = replace(
            run,
            chunks=tuple(leading_recompute(chunk, leading) for chunk in full_recompute(run.chunks)),
            assumptions=(*run.assumptions, f"{leading} recomputed layers in each chunk: with fewer it would not fit"),
        )
        again = predict(candidate)
        if again.fits:
            found, most = (candidate, again), leading - 1
        else:
            fewest = leading + 1
    return found or (run, prediction)
