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
@given(pp=st.integers(1, 32), virtual=st.integers(1, 4), mtp=st.integers(0, 2), data=st.data())
def test_megatron_reads_the_counts(pp: int, virtual: int, mtp: int, data: st.DataObject) -> None:
    size = pp * virtual
    most = 130 if virtual == 1 else 12
    counts = data.draw(st.lists(st.integers(0, most), min_size=size, max_size=size).filter(any))
    layout = layer_layout.PipelineParallelLayerLayout(layout_string(counts, mtp), pp)
    layout.validate_layer_layout(num_layers=sum(counts), mtp_num_layers=mtp)
    assert layout.virtual_pipeline_model_parallel_size == virtual

    def layers(kind: LayerType) -> list[int]:
        return [layout.layout[k % pp][k // pp].count(kind) for k in range(size)]

    assert layers(LayerType.decoder) == counts
    assert layers(LayerType.embedding) == [int(k == 0) for k in range(size)]
    assert layers(LayerType.loss) == [int(k == size - 1) for k in range(size)]
    assert layers(LayerType.mtp) == [mtp * (k == size - 1) for k in range(size)]
