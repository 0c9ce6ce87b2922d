"""Rendered layouts against the parser of the installed megatron-core."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniap_tune.render.layout import layout_string

pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns of every optional package that is not there
    layer_layout = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    from megatron.core.transformer.enums import LayerType


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 130), min_size=1, max_size=64).filter(any), mtp=st.integers(0, 2))
def test_megatron_reads_the_counts(counts: list[int], mtp: int) -> None:
    layout = layer_layout.PipelineParallelLayerLayout(layout_string(counts, mtp), len(counts))
    layout.validate_layer_layout(num_layers=sum(counts), mtp_num_layers=mtp)
    stages = range(len(counts))

    def layers(kind: LayerType) -> list[int]:
        return [layout.get_num_layers_to_build(kind, vp_stage=0, pp_rank=stage) for stage in stages]

    assert layers(LayerType.decoder) == counts
    assert layers(LayerType.embedding) == [int(stage == 0) for stage in stages]
    assert layers(LayerType.loss) == [int(stage == len(counts) - 1) for stage in stages]
    assert layers(LayerType.mtp) == [mtp * (stage == len(counts) - 1) for stage in stages]
