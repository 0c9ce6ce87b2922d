"""Collectives: known values of the alpha-beta model, placement, monotonicity."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_cost_model import make_cluster
from uniap_tune.cost.comm import Group, Network
from uniap_tune.cost.efficiency import load_efficiency
from uniap_tune.spec import Link

IDEAL = replace(load_efficiency("generic"), link=1.0, network=1.0, collective_latency_s=0.0)
FREE = replace(make_cluster(4), intra=Link(bandwidth=300e9, latency_s=0.0), inter=Link(bandwidth=25e9, latency_s=0.0))
NETWORK = Network(FREE, IDEAL)


def test_ring_volumes():
    inside = Group(8, 1)
    assert NETWORK.all_gather(8e9, inside) == pytest.approx(7 / 8 * 8e9 / 300e9)
    assert NETWORK.all_reduce(8e9, inside) == pytest.approx(2 * NETWORK.reduce_scatter(8e9, inside))
    assert NETWORK.all_gather(8e9, Group(1, 1)) == 0


def test_a_group_across_nodes_uses_the_rails_of_all_its_local_ranks():
    """Eight rails of 25 GB/s: eight local ranks share 200 GB/s, two of stride 4 have 50, one has 25."""
    size = 1e9
    for stride, bandwidth in ((1, 200e9), (4, 50e9), (8, 25e9)):
        group = Group(32 // stride, stride)
        assert NETWORK.all_gather(size, group) == pytest.approx((1 - 1 / group.size) * size / bandwidth)


def test_a_domain_of_several_nodes_owns_the_rails_of_all_of_them():
    """Two domains of two nodes: sixteen local ranks share sixteen rails of 25 GB/s, more than the intra link has."""
    network = Network(replace(FREE, domain_size=16), IDEAL)
    assert network.all_gather(1e9, Group(32, 1)) == pytest.approx(31 / 32 * 1e9 / 300e9)
    assert network.all_gather(1e9, Group(16, 2)) == pytest.approx(15 / 16 * 1e9 / 200e9)


def test_a_group_inside_the_domain_does_not_touch_the_network():
    assert NETWORK.local_ranks(Group(2, 4)) == 2
    assert NETWORK.local_ranks(Group(4, 4)) == 2
    big = Network(replace(FREE, domain_size=32), IDEAL)
    assert big.all_gather(1e9, Group(32, 1)) == pytest.approx(31 / 32 * 1e9 / 300e9)


def test_a_mesh_gives_a_group_only_the_links_between_its_members():
    """Seven links of 64 GB/s: two devices share one, four share three each, eight all seven; a pair sends over one."""
    mesh = Network(replace(FREE, intra=Link(bandwidth=448e9, latency_s=0.0, mesh=True)), IDEAL)
    for ranks, links in ((2, 1), (4, 3), (8, 7)):
        seconds = mesh.all_gather(1e9, Group(ranks, 1))
        assert seconds == pytest.approx((1 - 1 / ranks) * 1e9 / (links * 64e9))
        assert mesh.all_to_all(1e9, 1, Group(ranks, 1)) == pytest.approx((1 - 1 / ranks) * 1e9 / (links * 64e9))
    assert mesh.send(1e9, 1) == pytest.approx(28 / 31 * 1e9 / 64e9 + 3 / 31 * 1e9 / 25e9)
    assert mesh.all_gather(1e9, Group(32, 1)) == pytest.approx(31 / 32 * 1e9 / 200e9)  # the rails are the bottleneck


def test_a_token_crosses_to_another_domain_once():
    """Top-8 routing over four nodes: 3.6 nodes are visited on average, three quarters of them remote."""
    visited = 4 * (1 - 0.75**8)
    assert NETWORK.all_to_all(1e9, 8, Group(32, 1)) == pytest.approx(visited * 0.75 * 1e9 / 25e9)


def test_sends_average_over_the_borders_that_cross_a_node():
    """Of 31 borders between 32 stages on four nodes three cross; inside one node none does."""
    one, two = NETWORK.send(1e9, 1), NETWORK.send(1e9, 8)
    assert one == pytest.approx(28 / 31 * 1e9 / 300e9 + 3 / 31 * 1e9 / 25e9)
    assert two == pytest.approx(1e9 / 25e9)
    node = Network(replace(FREE, num_nodes=1), IDEAL)
    for stride in (1, 2, 4):
        assert node.send(1e9, stride) == pytest.approx(1e9 / 300e9)


@given(st.floats(1, 1e10), st.sampled_from([2, 4, 8, 16, 32]), st.sampled_from([1, 2, 4, 8]))
def test_more_bytes_never_take_less_time(size, ranks, stride):
    network = Network(make_cluster(4), IDEAL)
    group = Group(ranks, stride)
    assert network.all_gather(2 * size, group) > network.all_gather(size, group) > 0
