"""The caching allocator: its cutting rules, and what they cost states that are tensors of their own."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_model
from uniap_tune.cost.allocator import CachingAllocator, uncut_activations, uncut_states
from uniap_tune.graph import build_graph
from uniap_tune.spec import Moe
from uniap_tune.weights import rank_parameters, rank_tensors

MIB = 2**20
SIZES = st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=40)


def test_small_tensors_share_segments_and_round_to_512_bytes() -> None:
    allocator = CachingAllocator()
    one, two = allocator.allocate(1), allocator.allocate(513)
    assert (one[0], two[0]) == (512, 1024)
    assert one[1] == two[1]
    assert allocator.allocated == 1536


def test_a_remainder_up_to_a_mebibyte_is_not_cut_off() -> None:
    allocator = CachingAllocator()
    for _ in range(6):
        assert allocator.allocate(3 * MIB)[0] == 3 * MIB
    assert allocator.allocate(int(1.5 * MIB))[0] == 2 * MIB  # what 20 MiB leave after six of three
    assert allocator.allocate(int(10.5 * MIB))[0] == int(10.5 * MIB)  # a segment of 12, of which 1.5 are cut off
    assert allocator.allocate(int(11.5 * MIB))[0] == 12 * MIB


def test_free_neighbours_become_one_block() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    for block in blocks[:3]:
        allocator.release(block)
    assert allocator.allocate(15 * MIB)[1] == blocks[0][1]


@given(SIZES, st.data())
def test_no_two_live_blocks_overlap(sizes: list[int], data: st.DataObject) -> None:
    allocator = CachingAllocator()
    live = []
    for size in sizes:
        block = allocator.allocate(size)
        assert size <= block[0] < size + MIB + 512
        live.append(block)
        if data.draw(st.booleans()):
            allocator.release(live.pop(data.draw(st.integers(0, len(live) - 1))))
    live.sort(key=lambda block: (block[1], block[2]))
    for (size, segment, offset), (_, following, start) in pairwise(live):
        assert segment != following or offset + size <= start
    assert allocator.allocated == sum(block[0] for block in live)


def test_states_of_even_sizes_lose_next_to_nothing() -> None:
    assert uncut_states((1024 * 4096,) * 20, 2, 4) == 0  # 8 and 16 MiB
    uneven = (768 * 2304, 768 * 768, 768 * 3072, 768 * 3072) * 12  # 3.4 to 9 MiB: hidden size 768
    assert 0.005 < uncut_states(uneven, 2, 4) / (18 * sum(uneven)) < 0.05


def test_activations_lose_what_does_not_divide_a_segment() -> None:
    """GPT at hidden size 512 and tp 4 keeps 3 MiB of heads between tensors of 4 MiB: Megatron's tests show 11 MiB."""
    even = ((4 * MIB, True), (16 * MIB, False), (2 * MIB, True))
    assert uncut_activations(even, 12) == 0
    scores = ((8 * MIB, False), (8 * MIB, True), (8 * MIB, True), (4 * MIB, True))
    attention = ((4 * MIB, True), (4 * MIB, True), (3 * MIB, True), *scores, (1 * MIB, False), (1 * MIB, True))
    mlp = ((4 * MIB, False), (2 * MIB, True), (4 * MIB, True), (4 * MIB, True), (4 * MIB, True), (4 * MIB, True))
    layer = (*attention, *mlp, (4 * MIB, False), (2 * MIB, True))
    assert 8 * MIB <= uncut_activations(layer, 12) <= 12 * MIB


@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), min_size=1, max_size=20), st.integers(1, 6))
def test_activations_lose_less_than_a_mebibyte_each(forward: list[tuple[int, bool]], times: int) -> None:
    kept = sum(is_kept for _, is_kept in forward) * times
    assert 0 <= uncut_activations(tuple(forward), times) <= kept * (MIB + 512)


def test_tensors_of_a_rank_are_its_parameters() -> None:
    experts = Moe(num_experts=4, top_k=2, expert_ffn_size=512, shared_ffn_size=256)
    plain = tiny_model(2)
    for model in (plain, replace(plain, moe=experts), replace(plain, gated_mlp=False)):
        for layer in build_graph(model).layers:
            for tp, ep in ((1, 1), (2, 2)):
                sizes = rank_tensors(model, layer.type, tp, ep=ep)
                assert sum(sizes) == rank_parameters(model, layer.type, tp, ep=ep)
    joined = rank_tensors(plain, build_graph(plain).layers[1].type, 1)
    assert plain.hidden_size * (plain.q_width + 2 * plain.kv_width) in joined
    assert (2 if plain.gated_mlp else 1) * plain.hidden_size * plain.ffn_size in joined
