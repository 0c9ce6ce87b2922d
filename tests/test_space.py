"""The legal space: grids that fill the stage, what targets restrict, what knobs remove."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny, tiny_model
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import read_model
from uniap_tune.errors import InputError
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.space import KNOBS, Family, Knobs, Space, divisors, parse_knobs
from uniap_tune.spec import Job, Moe, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target


def space(target: Target = Target.MEGATRON, cluster: str = "1x8:h100", batch: int = 16, **more: object) -> Space:
    base = tiny(target, num_layers=6, cluster=cluster, global_batch=batch).space
    return replace(base, **more)  # type: ignore[arg-type]


def everything(legal: Space) -> list[tuple[int, int, Family]]:
    return [
        (pp, c, family)
        for pp in legal.pipeline_sizes()
        for c in legal.microbatch_counts()
        for family in legal.families(pp, c)
    ]


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize("cluster", ["1x1:h100", "1x8:h100", "3x4:a100-80gb", "4x8:h100"])
def test_every_strategy_fills_its_stage_and_shares_the_batch(target: Target, cluster: str) -> None:
    legal = space(target, cluster, batch=24)
    devices = legal.cluster.num_devices
    found = everything(legal)
    assert found
    for pp, c, family in found:
        assert 24 % c == 0
        for s in family.blocks:
            assert s.tp * s.dp * s.cp * pp == devices
            assert (24 // c) % s.dp == 0
            # DeepSpeed's bf16 pipelines hold gradients twice without ZeRO, even where nothing is replicated
            lone = target is Target.DEEPSPEED and pp > 1 and s.zero == 1
            assert s.zero == 0 or s.dp * s.cp > 1 or lone
            assert legal.model.num_heads % s.tp == 0
            assert s.tp <= legal.cluster.fast_domain
        assert len(set(family.blocks)) == len(family.blocks)


def test_pipelines_hold_at_least_one_layer_a_stage() -> None:
    assert space(cluster="1x8:h100").pipeline_sizes() == [1, 2, 4, 8]  # 6 blocks, the embedding and the head
    assert space(cluster="2x8:h100").pipeline_sizes() == [1, 2, 4, 8]


def test_megatron_uses_one_grid_and_zero_1_in_pipelines() -> None:
    for pp, _, family in everything(space(Target.MEGATRON)):
        assert len({(s.tp, s.cp, s.dp, s.zero) for s in family.blocks}) == 1
        if pp > 1:
            assert family.blocks[0].zero <= 1
        assert len(family.blocks) == (2 if family.leading else 1)
        if family.leading:
            assert [s.recompute for s in family.blocks] == [Recompute.NONE, Recompute.FULL]
    grids = {(pp, f.blocks[0].tp, f.blocks[0].zero) for pp, _, f in everything(space(Target.MEGATRON))}
    assert {(1, 1, 3), (2, 4, 0), (2, 2, 1)} <= grids


def test_deepspeed_has_no_tensor_parallel_pipelines_and_no_sequence_parallelism() -> None:
    found = everything(space(Target.DEEPSPEED))
    assert any(pp > 1 for pp, _, _ in found)
    assert any(f.blocks[0].tp > 1 for _, _, f in found)
    for pp, _, family in found:
        s = family.blocks[0]
        assert pp == 1 or s.tp == 1
        assert pp == 1 or s.zero <= 1
        assert not s.sequence_parallel
        assert s.cp == 1
        assert s.recompute in (Recompute.NONE, Recompute.FULL)
        assert not family.leading


def test_any_mixes_everything_in_one_family() -> None:
    legal = space(Target.ANY)
    (family,) = legal.families(2, 4)
    assert family.blocks == tuple(s for s in legal.strategies(2) if 4 % s.dp == 0)
    assert {s.tp for s in family.blocks} == {1, 2, 4}
    assert {s.zero for s in family.blocks} == {0, 1, 2, 3}


def test_strategies_are_sorted_simplest_first() -> None:
    for target in Target:
        found = space(target).strategies(1)
        assert [s.simplicity for s in found] == sorted(s.simplicity for s in found)


def test_other_layers_never_recompute() -> None:
    (family,) = space(Target.ANY).families(2, 4)
    for kind in (LayerKind.EMBEDDING, LayerKind.HEAD):
        chosen = family.strategies(LayerType(kind=kind))
        assert {s.recompute for s in chosen} == {Recompute.NONE}
        assert len(set(chosen)) == len(chosen)
        assert {replace(s, recompute=Recompute.NONE) for s in family.blocks} == set(chosen)
    assert family.strategies(LayerType(kind=LayerKind.BLOCK)) == family.blocks


def test_interleaving_needs_micro_batches_in_multiples_of_the_stages() -> None:
    for pp, c, family in everything(space(cluster="1x8:h100", batch=24)):
        if family.virtual_stages > 1:
            assert pp > 1
            assert c % pp == 0
            assert family.virtual_stages * pp <= 8  # 6 blocks, the embedding and the head
    assert {f.virtual_stages for _, _, f in everything(space())} == {1, 2, 3, 4}
    for target in (Target.DEEPSPEED, Target.ANY):
        assert {f.virtual_stages for _, _, f in everything(space(target))} == {1}


def test_virtual_stages_are_a_knob() -> None:
    one = space(knobs=parse_knobs([], ["vpp=1"], []))
    assert {f.virtual_stages for _, _, f in everything(one)} == {1}
    two = space(knobs=parse_knobs(["vpp=2"], [], []))
    assert {(pp > 1, f.virtual_stages) for pp, _, f in everything(two)} == {(True, 2)}


def mixture(target: Target = Target.MEGATRON, **more: object) -> Space:
    moe = Moe(num_experts=8, top_k=2, expert_ffn_size=512)
    return space(target, model=replace(tiny_model(), moe=moe), **more)


def test_experts_have_a_grid_of_their_own() -> None:
    found = {(s.tp, s.ep, s.etp) for s in mixture().strategies(1)}
    assert {(1, ep, 1) for ep in (1, 2, 4, 8)} <= found
    assert (2, 4, 2) in found  # experts split as the rest
    assert (2, 8, 1) in found  # whole experts over tensor-parallel ranks
    assert (2, 8, 2) not in found  # 16 ranks
    for target in Target:
        for s in mixture(target).strategies(1):
            assert s.num_devices % (s.ep * s.etp) == 0
            assert s.ep == 1 or s.tp == 1 or s.sequence_parallel
    assert {s.ep for s in mixture(Target.DEEPSPEED).strategies(1)} == {1}
    fixed = mixture(knobs=parse_knobs(["ep=2"], [], ["etp=2"]))
    assert {s.ep for s in fixed.strategies(1)} == {2}
    assert {s.etp for s in fixed.strategies(1)} == {1, 4}
    assert {s.ep for s in space().strategies(1)} == {1}  # no experts


def test_layers_without_experts_do_not_choose_their_grid() -> None:
    (family,) = mixture(Target.ANY).families(1, 2)
    assert {s.ep for s in family.strategies(LayerType(kind=LayerKind.BLOCK, moe=True))} == {1, 2, 4, 8}
    assert {s.ep for s in family.strategies(LayerType(kind=LayerKind.BLOCK))} == {1}


def test_flash_attention_makes_selective_recompute_pointless() -> None:
    legal = space()
    modes = {s.recompute for s in legal.strategies(1)}
    assert modes == {Recompute.NONE, Recompute.FULL}
    plain = replace(legal, job=replace(legal.job, flash_attention=False))
    assert {s.recompute for s in plain.strategies(1)} == set(Recompute)


def test_allowed_recompute_is_obeyed() -> None:
    legal = space()
    only = replace(legal, job=replace(legal.job, allowed_recompute=frozenset({Recompute.NONE})))
    assert {s.recompute for s in only.strategies(1)} == {Recompute.NONE}
    assert not any(f.leading for f in only.families(1, 2))


def test_sequence_parallelism_needs_a_sequence_that_splits() -> None:
    legal = space()
    assert all(s.sequence_parallel == (s.tp > 1) for s in legal.strategies(1))
    odd = replace(legal, job=Job(global_batch=16, seq_length=1023))
    assert not any(s.sequence_parallel for s in odd.strategies(1))


def test_context_parallelism_for_long_sequences_and_few_samples() -> None:
    assert {s.cp for s in space().strategies(1)} == {1}
    long = space(model=tiny_model(6), job=Job(global_batch=16, seq_length=32768))
    assert {s.cp for s in long.strategies(1)} == {1, 2, 4, 8}
    few = space(batch=4, cluster="1x8:h100")
    assert {s.cp for s in few.strategies(1)} == {1, 2, 4, 8}
    asked = space(knobs=Knobs(fix={"cp": "2"}))
    assert {s.cp for s in asked.strategies(1)} == {2}


def test_tensor_parallelism_over_the_slow_network_only_when_asked() -> None:
    legal = space(cluster="4x2:h100")
    assert max(s.tp for s in legal.strategies(1)) == 2
    asked = replace(legal, knobs=Knobs(fix={"tp": "4"}))
    assert {s.tp for s in asked.strategies(1)} == {4}


@pytest.mark.parametrize(
    ("knob", "value"),
    [("tp", 2), ("dp", 4), ("zero", 1), ("recompute", "full"), ("pp", 2), ("microbatches", 4), ("mbs", 2), ("cp", 1)],
)
def test_knobs(knob: str, value: int | str) -> None:
    def reading(pp: int, c: int, s: Strategy) -> int | str:
        known: dict[str, int | str] = {"pp": pp, "microbatches": c, "mbs": 16 // (c * s.dp)}
        return known[knob] if knob in known else getattr(s, knob)

    def values(knobs: Knobs) -> set[int | str]:
        return {reading(pp, c, s) for pp, c, f in everything(space(knobs=knobs)) for s in f.blocks}

    free = values(Knobs())
    assert value in free
    assert values(Knobs(fix={knob: str(value)})) == {value}
    assert values(Knobs(forbid=frozenset({(knob, str(value))}))) == free - {value}
    if isinstance(value, int):
        assert values(Knobs(maximum={knob: value})) == {v for v in free if int(v) <= value}


def test_parse_knobs() -> None:
    knobs = parse_knobs(["tp=08", "recompute=full"], ["zero=0"], ["pp=2", "pp=4"])
    assert dict(knobs.fix) == {"tp": "8", "recompute": "full"}
    assert dict(knobs.maximum) == {"zero": 0}
    assert knobs.forbid == {("pp", "2"), ("pp", "4")}
    assert knobs.allows("tp", 8)
    assert not knobs.allows("tp", 4)
    assert not knobs.allows("zero", 1)
    assert not knobs.allows("pp", 2)
    assert knobs.allows("pp", 8)


BAD_KNOBS = [
    *(
        "tp",
        "tp=",
        "=8",
        "tp=x",
        "tp=-1",
        "tp=0",
        "tp=1.5",
        "tp=1e3",
        "tp=²",
        "xp=2",
        "ep=0",
        "zero=4",
        "zero=-1",
        "TP=8",
    ),
    *("recompute=some", "recompute=", "tp=8=8", "tp= 8", "", "tp=" + "9" * 5000),
]


@pytest.mark.parametrize("text", BAD_KNOBS, ids=lambda text: text[:12])
@pytest.mark.parametrize("option", ["fix", "max", "forbid"])
def test_bad_knobs_are_refused(option: str, text: str) -> None:
    lists = {"fix": [text] if option == "fix" else [], "max": [text] if option == "max" else []}
    with pytest.raises(InputError) as caught:
        parse_knobs(lists["fix"], lists["max"], [text] if option == "forbid" else [])
    assert f"--{option}" in caught.value.what


def test_recompute_has_no_order() -> None:
    with pytest.raises(InputError, match="no order"):
        parse_knobs([], ["recompute=full"], [])


@given(st.text(max_size=12), st.sampled_from([*KNOBS, "x"]))
def test_any_text_is_a_knob_or_refused(text: str, knob: str) -> None:
    try:
        knobs = parse_knobs([f"{knob}={text}"], [], [])
    except InputError:
        return
    assert knobs.fix[knob] in set(Recompute) or int(knobs.fix[knob]) >= 0


def test_names_tell_families_apart() -> None:
    for target in (Target.MEGATRON, Target.DEEPSPEED):
        legal = space(target, cluster="2x8:h100", job=Job(global_batch=16, seq_length=32768, flash_attention=False))
        for pp in legal.pipeline_sizes():
            families = legal.families(pp, 1)
            assert len({f.name for f in families}) == len(families)


def test_no_family_for_a_batch_that_cannot_be_shared() -> None:
    legal = Space(
        model=tiny_model(2),
        cluster=read_cluster("1x7:h100"),
        job=Job(global_batch=16, seq_length=512),
        capabilities=CAPABILITIES[Target.MEGATRON],
    )
    assert everything(legal) == []


@pytest.mark.parametrize(
    ("bias", "length", "grids"), [(False, 1024, {1, 2, 4, 8}), (True, 1024, {1}), (False, 1026, {1, 2})]
)
def test_experts_are_split_only_as_megatron_trains_them(bias: bool, length: int, grids: set[int]) -> None:
    """Without biases, and where tensor parallelism is used only with a sequence that splits."""
    legal = Space(
        model=replace(read_model("mixtral-8x7b"), mlp_bias=bias),
        cluster=read_cluster("1x8:h100"),
        job=Job(global_batch=8, seq_length=length),
        capabilities=CAPABILITIES[Target.MEGATRON],
    )
    found = legal.strategies(1)
    assert {s.etp for s in found} == grids
    assert all(s.tp == 1 or s.sequence_parallel for s in found)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "falcon", "bloom"])
def test_deepspeed_cuts_only_the_families_that_its_tensor_parallelism_knows(family: str) -> None:
    legal = space(Target.DEEPSPEED)
    refused = replace(legal, model=replace(legal.model, family=family))
    assert {s.tp for s in legal.strategies(1)} > {1} == {s.tp for s in refused.strategies(1)}
    assert {s.tp for s in replace(refused, capabilities=CAPABILITIES[Target.MEGATRON]).strategies(1)} > {1}


def test_deepspeed_cuts_attention_by_whole_key_value_heads() -> None:
    legal = space(Target.DEEPSPEED)
    grouped = replace(legal.model, num_kv_heads=2)
    assert {s.tp for s in replace(legal, model=grouped).strategies(1)} == {1, 2}
