"""Encoders (BERT) and encoder-decoders (T5): their graph, parameters, and what their attention costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.records import megatron_record, record
from uniap_tune.adapters.records import RecordLine, evaluate, read_run
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import TP_COMM
from uniap_tune.graph import LayerKind, build_graph
from uniap_tune.predict import Prediction, Run, predict
from uniap_tune.strategy import Strategy
from uniap_tune.weights import layer_parameters, parameter_count


def run_of(kind: str, **arguments: object) -> Run:
    """The run of a test of Megatron's with this kind of model."""
    evaluated = evaluate(RecordLine(0, {**megatron_record(**arguments), "test": f"{kind}/case"}))
    assert evaluated.run is not None, evaluated.reason
    return evaluated.run


def t5(**arguments: object) -> Run:
    """T5 with two blocks in encoder and decoder, one GPU."""
    sizes: dict[str, Any] = {
        "encoder_num_layers": 2,
        "decoder_num_layers": 2,
        "encoder_seq_length": 512,
        "decoder_seq_length": 128,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "num_layers": None,
        "seq_length": None,
    }
    return run_of("t5", **{**sizes, **arguments})


def with_job(run: Run, **changes: Any) -> Prediction:
    """The prediction with another job."""
    return predict(replace(run, job=replace(run.job, **changes)))


def test_the_encoder_feeds_every_block_of_the_decoder() -> None:
    graph = build_graph(t5(decoder_num_layers=3).model)
    names = [layer.name for layer in graph.layers]
    assert names == ["embedding", "encoder.0", "encoder.1", "layers.0", "layers.1", "layers.2", "head"]
    into = {target: sorted(u for u, v in graph.edges if v == target) for target in range(1, 7)}
    assert into == {1: [0], 2: [1], 3: [0, 2], 4: [2, 3], 5: [2, 4], 6: [5]}
    assert not graph.is_chain
    assert [layer.type.cross for layer in graph.layers if layer.type.kind is LayerKind.BLOCK] == [False] * 2 + [
        True
    ] * 3


def test_cross_attention_has_a_norm_and_four_matrices() -> None:
    model = t5().model
    encoder, decoder = (build_graph(model).layers[place].type for place in (1, 3))
    hidden = model.hidden_size
    assert layer_parameters(model, decoder) - layer_parameters(model, encoder) == 4 * hidden**2 + 6 * hidden


def test_bert_has_a_head_of_its_own() -> None:
    plain = run_of("bert").model
    without = run_of("bert", bert_no_binary_head=True).model
    hidden = plain.hidden_size
    pooler = hidden**2 + hidden + 2 * hidden + 2
    assert parameter_count(plain) - parameter_count(without) == pooler + 2 * hidden  # and two token types
    gpt = replace(without, causal=True, head_transform=False)
    assert parameter_count(without) - parameter_count(gpt) == hidden**2 + 3 * hidden
    assert build_graph(plain).is_chain


def test_attention_to_both_sides_takes_twice_the_pairs() -> None:
    run = run_of("bert", attention_backend="flash", seq_length=16384, num_gpus=8)
    causal = replace(run.model, causal=True)
    chunks = tuple(tuple(replace(part, type=replace(part.type, causal=True)) for part in chunk) for chunk in run.chunks)
    assert predict(run).step_time_s > 1.05 * predict(replace(run, model=causal, chunks=chunks)).step_time_s


@pytest.mark.parametrize("stack", ["seq_length", "encoder_seq_length"])
def test_both_sequences_take_time_and_memory(stack: str) -> None:
    run = t5()
    known = predict(run)
    doubled = with_job(run, **{stack: 2 * getattr(run.job, stack)})
    assert doubled.step_time_s > known.step_time_s
    assert doubled.peak_memory_bytes > known.peak_memory_bytes
    assert doubled.steady_memory_bytes == known.steady_memory_bytes


def test_t5_without_layers_has_its_published_ones() -> None:
    run = t5(encoder_num_layers=None, decoder_num_layers=None, hidden_size=768, num_attention_heads=12)
    assert (run.model.encoder_layers, run.model.num_layers) == (12, 12)
    assert any("12 layers" in assumption for assumption in run.assumptions)
    assert not run.exact


def test_models_of_plain_records_are_of_their_kind() -> None:
    sizes = {"name": "t5-large", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "act": "gelu"}
    large = read_run(record(model=sizes, seq_length=512, tp=1, dp=8))
    assert (large.model.encoder_layers, large.model.num_layers, large.job.encoder_seq_length) == (24, 24, 512)
    assert large.model.relative_buckets == 32
    fewer = read_run(record(model={**sizes, "decoder_layers": 6}, encoder_seq_length=2048, seq_length=512, tp=1, dp=8))
    assert (fewer.model.encoder_layers, fewer.model.num_layers, fewer.job.encoder_seq_length) == (24, 6, 2048)
    apart = {**sizes, "num_hidden_layers": None, "encoder_layers": 12, "decoder_layers": 3}
    model = read_run(record(model=apart, seq_length=512, tp=1, dp=8)).model
    assert (model.encoder_layers, model.num_layers) == (12, 3)
    bert = read_run(record(model={**sizes, "name": "bert-huge"}, seq_length=512, tp=1, dp=8))
    assert not bert.model.causal
    assert predict(large).peak_memory_bytes > predict(bert).peak_memory_bytes


def test_t5_of_an_unknown_width_needs_its_layers() -> None:
    wide = megatron_record(num_layers=None, hidden_size=800)
    evaluated = evaluate(RecordLine(0, {**wide, "test": "t5/case"}))
    assert evaluated.reason == "record has no layers"


def test_each_layer_exchanges_its_own_sequence_and_once_more_for_cross_attention() -> None:
    sizes = {"name": "t5", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "act": "gelu"}
    run = read_run(record(model=sizes, encoder_seq_length=512, seq_length=128, sequence_parallel=False))
    costs = CostModel(run.model, run.cluster, run.job, run.capabilities, runtime=run.runtime)
    blocks = {layer.type for layer in build_graph(run.model).layers if layer.type.kind is LayerKind.BLOCK}
    layers = {
        block.encoder: costs.layer_cost(block, Strategy(tp=2, dp=4), samples=4096, pp=1, num_microbatches=1)
        for block in blocks
    }
    seconds = {encoder: cost.forward_s[TP_COMM] for encoder, cost in layers.items()}
    assert seconds[True] / seconds[False] == pytest.approx(2 * 512 / (3 * 128), rel=0.05)
