"""Every rule of Megatron, each with a configuration that breaks it and nothing else; plans of the search break none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.launches import Launch, megatron_launches
from tests.plans import make_plan
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import read_model
from uniap_tune.errors import InfeasibleError, InputError
from uniap_tune.megatron.facts import CONNECTIONS, MegatronFacts
from uniap_tune.megatron.layout import first_and_last, parse_layout
from uniap_tune.megatron.rules import RULES, violations
from uniap_tune.plan import Plan
from uniap_tune.planner import plan
from uniap_tune.render.layout import layout_string
from uniap_tune.render.megatron import megatron_launch
from uniap_tune.render.shell import Variable
from uniap_tune.space import Space
from uniap_tune.spec import Cluster, Job, Model
from uniap_tune.strategy import CAPABILITIES, Target

BASE: dict[str, str | bool] = {
    "num-layers": "32",
    "hidden-size": "4096",
    "ffn-hidden-size": "16384",
    "num-attention-heads": "32",
    "seq-length": "4096",
    "micro-batch-size": "1",
    "global-batch-size": "64",
    "disable-bias-linear": True,
}
TP: dict[str, str | bool] = {"tensor-model-parallel-size": "2"}
PP: dict[str, str | bool] = {"pipeline-model-parallel-size": "4"}
MOE: dict[str, str | bool] = {"num-experts": "8"}
VPP: dict[str, str | bool] = PP | {"num-virtual-stages-per-pipeline-rank": "2"}
LAYOUT = "pipeline-model-parallel-layout"
FULL: dict[str, str | bool] = {"recompute-granularity": "full"}

# rule -> arguments that break it on 32 devices
BREAKS: dict[str, dict[str, Any]] = {
    "grid_divides_world": {"context-parallel-size": "64"},
    "heads_divide": {"tensor-model-parallel-size": "8", "num-attention-heads": "12"},
    "groups_divide": TP | {"group-query-attention": True, "num-query-groups": "3"},
    "feed_forward_divides": {"tensor-model-parallel-size": "4", "ffn-hidden-size": "1026"},
    "sequence_divides": {"tensor-model-parallel-size": "4", "sequence-parallel": True, "seq-length": "4098"},
    "overlap_needs_sequence_parallel": TP | {"tp-comm-overlap": True},
    "overlap_is_not_deterministic": TP
    | {"tp-comm-overlap": True, "sequence-parallel": True, "deterministic-mode": True},
    "one_queue": TP | {"env": {}},
    "context_divides": {"context-parallel-size": "4", "seq-length": "4100"},
    "context_heads": {"context-parallel-size": "8", "cp-comm-type": "a2a", "num-attention-heads": "4"},
    "batch_divides": {"global-batch-size": "48"},
    "rampup_divides": {"rampup-batch-size": "16 16 1000"},
    "layers_divide": PP | {"num-layers": "30"},
    "layout_excludes_virtual": VPP | {LAYOUT: "Et*4|(t*4|)*6t*4L"},
    "layout_excludes_ends": PP | {LAYOUT: "Et*8|t*8|t*8|t*8L", "decoder-first-pipeline-num-layers": "8"},
    "layout_is_whole": PP | {LAYOUT: "Et*8|t*8|t*16L"},
    "middle_divides": PP | {"decoder-first-pipeline-num-layers": "7"},
    "accounted_divides": PP | {"account-for-loss-in-pipeline-split": True},
    "virtual_needs_pipeline": {"num-virtual-stages-per-pipeline-rank": "2"},
    "one_virtual_flag": VPP | {"num-layers-per-virtual-pipeline-stage": "4"},
    "ends_need_virtual_count": PP
    | {"decoder-last-pipeline-num-layers": "8", "num-layers-per-virtual-pipeline-stage": "4"},
    "virtual_size_divides": PP | {"num-layers-per-virtual-pipeline-stage": "3"},
    "virtual_count_divides": PP | {"num-virtual-stages-per-pipeline-rank": "3"},
    "virtual_count_divides_ends": VPP | {"decoder-first-pipeline-num-layers": "5"},
    "group_size": VPP | {"microbatch-group-size-per-virtual-pipeline-stage": "2"},
    "enough_microbatches": VPP | {"micro-batch-size": "4"},
    "experts_divide": MOE | {"expert-model-parallel-size": "16"},
    "expert_parallelism_needs_experts": {"expert-model-parallel-size": "2"},
    "expert_grid_divides_world": MOE | {"expert-tensor-parallel-size": "64"},
    "expert_bias": MOE | {"expert-tensor-parallel-size": "2", "disable-bias-linear": False},
    "experts_need_sequence_parallel": TP | MOE,
    "expert_overlap": MOE | {"overlap-moe-expert-parallel-comm": True},
    "param_gather_overlap": {"use-distributed-optimizer": True, "overlap-param-gather": True},
    "fsdp_checkpoint": {"use-megatron-fsdp": True, "env": {}},
    "fsdp_queues": {"use-megatron-fsdp": True, "ckpt-format": "fsdp_dtensor"},
    "fp8_gather": {"fp8-param-gather": True},
    "precision_aware": {"use-precision-aware-optimizer": True},
    "sharded_optimizer": {"optimizer": "sgd", "use-distributed-optimizer": True},
    "offloaded_optimizer": {"optimizer-cpu-offload": True},
    "optimizer_instances": {"num-distributed-optimizer-instances": "5"},
    "full_needs_method": FULL,
    "selective_forbids_method": {"recompute-granularity": "selective", "recompute-num-layers": "1"},
    "recompute_fits_chunk": PP | FULL | {"recompute-method": "block", "recompute-num-layers": "9"},
    "offloaded_layers": {"cpu-offloading-num-layers": "32"},
}

# More ways to break a rule.
MORE: list[tuple[str, dict[str, Any]]] = [
    ("layout_is_whole", PP | {LAYOUT: "Et*8|t*8|t*8|(t*8L"}),
    ("layout_is_whole", PP | {LAYOUT: "t*8|Et*8|t*8|t*8L"}),
    ("layout_is_whole", PP | {LAYOUT: "Et*8|t*8|t*8|Lt*8"}),
    ("layout_is_whole", PP | {LAYOUT: "Et*8|t*8|t*8|t*9L"}),
    ("virtual_needs_pipeline", {**VPP, "pipeline-model-parallel-size": "2", "no-overlap-p2p-communication": True}),
    ("accounted_divides", PP | {"account-for-loss-in-pipeline-split": True, "decoder-first-pipeline-num-layers": "8"}),
    ("param_gather_overlap", {"overlap-param-gather": True, "overlap-grad-reduce": True}),
    ("expert_overlap", MOE | PP | {"overlap-moe-expert-parallel-comm": True, "expert-model-parallel-size": "2"}),
    (
        "expert_overlap",
        MOE
        | FULL
        | {
            "overlap-moe-expert-parallel-comm": True,
            "expert-model-parallel-size": "2",
            "recompute-method": "uniform",
            "recompute-num-layers": "1",
        },
    ),
    ("offloaded_layers", PP | {"cpu-offloading-num-layers": "2"}),
    ("offloaded_layers", {"cpu-offloading-num-layers": "2", "recompute-activations": True}),
    ("virtual_count_divides_ends", VPP | {"decoder-last-pipeline-num-layers": "11"}),
    ("middle_divides", PP | {"decoder-first-pipeline-num-layers": "16", "decoder-last-pipeline-num-layers": "16"}),
    ("group_size", VPP | {"microbatch-group-size-per-virtual-pipeline-stage": "7"}),
]


def facts(changes: dict[str, Any]) -> MegatronFacts:
    """The base with changes; ``env`` replaces the environment, ``False`` takes a switch out."""
    environment = changes.get("env", {CONNECTIONS: "1"})
    merged = BASE | {name: value for name, value in changes.items() if name != "env"}
    kept = {name: value for name, value in merged.items() if value is not False}
    return MegatronFacts(kept, world=32, environment=environment)


def test_the_base_breaks_nothing() -> None:
    assert not violations(facts({}))


def test_every_rule_has_its_breach() -> None:
    assert set(BREAKS) == {rule.name for rule in RULES}


@pytest.mark.parametrize(("rule", "changes"), [*BREAKS.items(), *MORE])
def test_a_breach_is_named(rule: str, changes: dict[str, Any]) -> None:
    found = {violation.rule.name: violation for violation in violations(facts(changes))}
    assert rule in found
    violation = found[rule]
    assert violation.rule.source in str(violation)
    assert ("fails later" in str(violation)) is violation.rule.accepted


# Breaches that cannot come alone: a configuration that breaks the first breaks the others too.
TOGETHER = {
    "grid_divides_world": {"context_divides", "optimizer_instances"},
    "virtual_needs_pipeline": {"virtual_count_divides"},
    "one_virtual_flag": set(),
    "layout_excludes_virtual": set(),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_a_breach_breaks_no_other_rule(rule: str) -> None:
    found = {violation.rule.name for violation in violations(facts(BREAKS[rule]))}
    assert found - {rule} <= TOGETHER.get(rule, set())


def launch_facts(chosen: Plan, model: Model, cluster: Cluster, job: Job) -> MegatronFacts:
    launch = megatron_launch(chosen, model, cluster, job)
    values = {
        name.removeprefix("--"): True if value is True else str(value.default if isinstance(value, Variable) else value)
        for name, value in launch.arguments.items()
    }
    environment = {name: value for name, value in launch.environment.items() if value is not None}
    blackwell = cluster.device.generation == "blackwell"
    return MegatronFacts(values, world=cluster.num_devices, environment=environment, single_queue=not blackwell)


@pytest.mark.parametrize("launch", megatron_launches(), ids=lambda launch: launch.name)
def test_rendered_launches_break_no_rule(launch: Launch) -> None:
    found = launch_facts(launch.plan, launch.model, launch.cluster, launch.job)
    assert not violations(found)
    assert list(found.chunks) == list(map(len, launch.plan.virtual_stage_blocks()))


@settings(max_examples=25, deadline=None)
@given(
    model=st.sampled_from(["gpt2-xl", "llama-3.2-1b", "qwen2.5-0.5b", "llama-2-7b", "gpt-7.5b", "mixtral-8x7b"]),
    cluster=st.sampled_from(["1x4:l4", "1x8:a100-40gb", "2x8:h100", "1x6:a100-80gb", "2x4:b200"]),
    batch=st.sampled_from([8, 12, 24, 64]),
    length=st.sampled_from([512, 1024]),
)
def test_plans_of_the_search_break_no_rule(model: str, cluster: str, batch: int, length: int) -> None:
    what, where, job = read_model(model), read_cluster(cluster), Job(global_batch=batch, seq_length=length)
    try:
        chosen = plan(what, where, job)
    except (InfeasibleError, InputError):
        return
    assert not violations(launch_facts(chosen, what, where, job))


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "llama-3-8b", "gpt-3-175b"]),
    cluster=st.sampled_from(["2x8:h100", "4x8:a100-80gb", "8x8:b200", "3x8:h100"]),
    batch=st.sampled_from([32, 96, 128]),
    length=st.sampled_from([1024, 2048, 1026]),
    data=st.data(),
)
def test_no_family_of_the_search_breaks_a_rule(
    model: str, cluster: str, batch: int, length: int, data: st.DataObject
) -> None:
    """Whatever it would choose of them: grids of experts, virtual stages, recomputation."""
    what, where, job = read_model(model), read_cluster(cluster), Job(global_batch=batch, seq_length=length)
    space = Space(model=what, cluster=where, job=job, capabilities=CAPABILITIES[Target.MEGATRON])
    pp = data.draw(st.sampled_from([p for p in space.pipeline_sizes() if p <= what.num_layers]))
    families = [(c, family) for c in space.microbatch_counts() for family in space.families(pp, c)]
    assume(families)
    c, family = data.draw(st.sampled_from(families))
    parts = pp * family.virtual_stages
    assume(parts <= what.num_layers)
    blocks = [what.num_layers // parts + (i < what.num_layers % parts) for i in range(parts)]
    full = [1] * parts if family.leading else None
    shape = {"microbatches": c, "full": full, "virtual_stages": family.virtual_stages}
    made = make_plan(Target.MEGATRON, blocks, family.blocks[0], job, **shape)
    assert not violations(launch_facts(made, what, where, job))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(0, 2))
def test_layouts_are_read_as_they_are_written(counts: list[int], mtp: int) -> None:
    layout = parse_layout(layout_string(counts, mtp))
    assert list(layout.blocks) == counts
    assert not layout.faults(sum(counts), len(counts))


@pytest.mark.parametrize("text", ["Et*x", "E(t(t)*2)*3L", "Et*|L", "t*999999999", "(t*9999)*9999", "Ex"])
def test_layouts_out_of_the_grammar_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"grammar|symbols"):
        parse_layout(text)


def test_first_and_last_stage() -> None:
    assert first_and_last(32, 4, 7, 7) == (7, 9, 9, 7)
    assert first_and_last(32, 2, 15, None) == (15, 17)
    assert first_and_last(32, 2, 16, 16) == (16, 16)
    with pytest.raises(ValueError, match="does not divide"):
        first_and_last(32, 4, 6, 7)
