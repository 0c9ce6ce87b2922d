"""Arrays against the prices they were made from."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tiny import tiny
from uniap_tune.graph import LayerKind
from uniap_tune.schedule import Schedule
from uniap_tune.spec import Recompute
from uniap_tune.strategy import Target


@pytest.mark.parametrize("target", list(Target))
def test_every_column_is_a_price(target: Target) -> None:
    job = tiny(target, cluster="1x4:a100-80gb", num_layers=3, maximum=("zero=1",), limit_bytes=123.0)
    pricer, costs = job.pricer, job.pricer.costs
    for pp, c, family, problem in job.problems():
        made = pricer.formulate(pp, c, family)
        assert problem.num_stages == pp
        assert problem.num_microbatches == c
        assert problem.memory_limit_bytes == 123.0
        assert problem.schedule is Schedule.ONE_F_ONE_B
        assert problem.num_layers == 5
        assert problem.is_chain
        for layer, table, strategies in zip(pricer.graph.layers, problem.layers, made.strategies, strict=True):
            assert strategies == family.strategies(layer.type)
            for k, s in enumerate(strategies):
                samples = 4 // (c * s.dp)
                price = costs.layer_cost(layer.type, s, samples=samples, pp=pp, num_microbatches=c)
                assert table.time_s[k] == pytest.approx(price.time)
                assert table.step_time_s[k] == pytest.approx(price.step)
                assert table.static_bytes[k] == pytest.approx(price.static)
                assert table.microbatch_bytes[k] == pytest.approx(price.microbatch)
                buffers = costs.buffer_bytes(s, samples=samples, virtual_stages=family.virtual_stages)
                assert table.transient_bytes[k] == pytest.approx(price.transient_bytes + buffers)
                assert table.step_bytes[k] == pytest.approx(price.step_bytes)


def test_edges_hold_the_price_of_every_pair_of_layouts() -> None:
    job = tiny(Target.ANY, cluster="1x4:a100-80gb", num_layers=2)
    (family,) = job.space.families(2, 2)
    problem = job.pricer.formulate(2, 2, family).problem
    layouts = sorted({s.layout for s in family.blocks})
    assert problem.num_layouts == len(layouts) == 2
    table = problem.layers[1]
    assert [layouts[a] for a in table.layout] == [s.layout for s in family.blocks]
    costs = job.pricer.costs
    for edge in problem.edges:
        for a, source in enumerate(layouts):
            for b, target in enumerate(layouts):
                assert edge.reshard_s[a, b] == costs.reshard_seconds(source, target, microbatch=2)
                assert edge.send_s[a, b] == costs.send_seconds(source, target, microbatch=2, pp=2)
    assert job.pricer.least_send(2, 2, family) == problem.edges[0].send_s.min()
    assert job.pricer.least_send(1, 2, family) == 0.0


def test_another_limit_keeps_the_prices() -> None:
    job = tiny(Target.MEGATRON, limit_bytes=123.0)
    tight = job.pricer.with_limit(45.0)
    (first, *_), key = job.space.families(1, 1), (1, 1)
    made, again = job.pricer.formulate(*key, first), tight.formulate(*key, first)
    assert (made.problem.memory_limit_bytes, again.problem.memory_limit_bytes) == (123.0, 45.0)
    assert all(a is b for a, b in zip(made.costs[0], again.costs[0], strict=True))


def test_equal_layers_share_one_table() -> None:
    job = tiny(Target.ANY, num_layers=6)
    (family,) = job.space.families(1, 2)
    problem = job.pricer.formulate(1, 2, family).problem
    assert len({id(table) for table in problem.layers}) == 3
    assert len({id(edge.reshard_s) for edge in problem.edges}) == 1


def test_leading_rule() -> None:
    job = tiny(Target.MEGATRON, num_layers=3)
    family = next(f for f in job.space.families(2, 2) if f.leading)
    rule = job.pricer.formulate(2, 2, family, leading=2).problem.leading
    assert rule is not None
    assert rule.count == 2
    assert rule.counted == (False, True, True, True, False)
    for layer, marks in zip(job.pricer.graph.layers, rule.leading, strict=True):
        if layer.type.kind is LayerKind.BLOCK:
            assert marks.tolist() == [s.recompute is Recompute.FULL for s in family.blocks] == [False, True]
    plain = next(f for f in job.space.families(2, 2) if not f.leading)
    assert job.pricer.formulate(2, 2, plain).problem.leading is None


def test_full_recompute_trades_time_for_memory() -> None:
    """What the search over N relies on: a recomputed block is slower and holds less."""
    job = tiny(Target.MEGATRON, num_layers=3)
    family = next(f for f in job.space.families(1, 2) if f.leading)
    block = job.pricer.formulate(1, 2, family, leading=1).problem.layers[1]
    assert block.time_s[1] > block.time_s[0]
    assert block.microbatch_bytes[1] < block.microbatch_bytes[0]
    assert block.static_bytes[1] == block.static_bytes[0]
    assert np.all(np.isfinite(block.transient_bytes))
