"""The cost model: physics that must hold whatever the constants are."""

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import COMPUTE, DP_COMM, PARAMETERS, TP_COMM, ZERO_COMM
from uniap_tune.cost.runtime import Runtime
from uniap_tune.graph import LayerKind, LayerType, build_graph
from uniap_tune.spec import Cluster, Device, DType, Job, Link, Model, Moe, Precision, Recompute
from uniap_tune.strategy import CAPABILITIES, Layout, Strategy, Target

BLOCK, HEAD, EMBEDDING = (LayerType(kind=kind) for kind in (LayerKind.BLOCK, LayerKind.HEAD, LayerKind.EMBEDDING))

DEVICE = Device(
    name="test-gpu",
    vendor="nvidia",
    generation="ampere",
    memory_bytes=80e9,
    memory_bandwidth=2.0e12,
    peak_flops={DType.FP32: 19.5e12, DType.FP16: 312e12, DType.BF16: 312e12},
    num_sms=108,
)
MODEL = Model(
    name="test-7b",
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
)
JOB = Job(global_batch=64, seq_length=4096)


def make_cluster(nodes: int = 2, device: Device = DEVICE) -> Cluster:
    return Cluster(
        name="test",
        device=device,
        num_nodes=nodes,
        devices_per_node=8,
        intra=Link(bandwidth=300e9, latency_s=2e-6),
        inter=Link(bandwidth=25e9, latency_s=5e-6),
        rails_per_node=8,
    )


def make(job: Job = JOB, model: Model = MODEL, cluster: Cluster | None = None) -> CostModel:
    return CostModel(model, cluster or make_cluster(), job, CAPABILITIES[Target.ANY])


def price(cost_model: CostModel, layer: LayerType = BLOCK, *, samples: int = 1, pp: int = 1, **axes: object):
    strategy = Strategy(**axes)  # type: ignore[arg-type]
    return cost_model.layer_cost(layer, strategy, samples=samples, pp=pp, num_microbatches=8)


LAYERS = st.sampled_from([BLOCK, HEAD, EMBEDDING])
DEGREES = st.sampled_from([1, 2, 4, 8])
ZERO = st.sampled_from([0, 1, 2, 3])
RECOMPUTE = st.sampled_from(list(Recompute))


@given(LAYERS, DEGREES, DEGREES, ZERO, RECOMPUTE, st.integers(1, 8))
def test_more_samples_take_longer_in_total(layer, tp, dp, zero, recompute, samples):
    model = make()
    one = price(model, layer, tp=tp, dp=dp, zero=zero, recompute=recompute, samples=samples)
    two = price(model, layer, tp=tp, dp=dp, zero=zero, recompute=recompute, samples=samples + 1)
    assert two.time >= one.time
    assert two.microbatch >= one.microbatch
    assert two.transient_bytes >= one.transient_bytes


@given(LAYERS, DEGREES, ZERO, RECOMPUTE, st.booleans())
def test_tensor_parallelism_never_takes_more_parameter_memory(layer, tp, zero, recompute, sequence_parallel):
    model = make()
    one = price(model, layer, tp=tp, zero=zero, recompute=recompute)
    two = price(model, layer, tp=2 * tp, zero=zero, recompute=recompute, sequence_parallel=sequence_parallel)
    assert two.static <= one.static
    assert two.microbatch <= one.microbatch


@given(DEGREES, DEGREES, st.booleans(), st.booleans())
def test_recompute_trades_time_for_memory(tp, samples, flash, dropout):
    job = replace(JOB, flash_attention=flash)
    rate = 0.1 if dropout else 0.0
    model = make(job, replace(MODEL, attention_dropout=rate, hidden_dropout=rate))
    none, selective, full = (price(model, tp=tp, samples=samples, recompute=mode) for mode in Recompute)
    assert full.microbatch < selective.microbatch < none.microbatch
    assert full.time > selective.time > none.time


@given(DEGREES, st.sampled_from([2, 4, 8]), ZERO)
def test_context_parallelism_shrinks_activations(tp, cp, zero):
    model = make()
    assert price(model, tp=tp, cp=cp, zero=zero).microbatch < price(model, tp=tp, dp=cp, zero=zero).microbatch


@given(st.sampled_from([2, 4, 8]), RECOMPUTE)
def test_sequence_parallelism_shrinks_activations(tp, recompute):
    model = make()
    plain = price(model, tp=tp, recompute=recompute)
    sequence = price(model, tp=tp, recompute=recompute, sequence_parallel=True)
    assert sequence.microbatch < plain.microbatch


@given(LAYERS, DEGREES, st.sampled_from([2, 4, 8]))
def test_each_zero_stage_holds_less(layer, tp, dp):
    model = make()
    held = [price(model, layer, tp=tp, dp=dp, zero=zero).static for zero in range(4)]
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4


def test_adam_in_mixed_precision_takes_eighteen_bytes_a_parameter():
    cost = price(make())
    parameters = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert cost.static == 18 * parameters
    fp16 = price(make(replace(JOB, precision=Precision(compute=DType.FP16))))
    assert fp16.static == 16 * parameters
    assert fp16.step_bytes == 4 * parameters


def test_activations_of_a_gpt_block_match_the_paper():
    """arXiv 2205.05198 equations 1 and 2: s b h (34 + 5 a s / h); 34 / tp with sequence parallelism."""
    model = replace(MODEL, gated_mlp=False, ffn_size=4 * 4096, attention_dropout=0.1, hidden_dropout=0.1)
    job = replace(JOB, seq_length=2048, flash_attention=False)
    sbh, quadratic = 2048 * 4096, 5 * 32 * 2048**2
    assert price(make(job, model)).microbatch == 34 * sbh + quadratic
    split = price(make(job, model), tp=8, sequence_parallel=True)
    assert split.microbatch == (34 * sbh + quadratic) / 8
    assert price(make(job, model), tp=8).microbatch == 10 * sbh + (24 * sbh + quadratic) / 8


def test_a_tied_head_copies_the_embedding_only_on_another_stage():
    model = make(model=replace(MODEL, tied_embeddings=True))
    assert price(model, HEAD, pp=2).static > 100 * price(model, HEAD, pp=1).static


def test_gradient_bytes_are_the_engines():
    megatron = CostModel(MODEL, make_cluster(), JOB, CAPABILITIES[Target.MEGATRON])
    deepspeed = CostModel(MODEL, make_cluster(), JOB, CAPABILITIES[Target.DEEPSPEED])
    assert price(megatron).static_bytes["gradients"] == 2 * price(deepspeed).static_bytes["gradients"]


def block_seconds(device: Device = DEVICE, job: Job = JOB, model: Model = MODEL, tp: int = 1) -> float:
    """Compute seconds of a block forward and backward, without communication."""
    cost_model = make(job, model, make_cluster(1, device))
    cost = price(cost_model, BLOCK, tp=tp, samples=4)
    return cost.forward_s[COMPUTE] + cost.backward_s[COMPUTE]


def test_rows_that_end_within_128_bytes_cost_time():
    """bigscience's 14400 against 13824 at tp 8: 1.8 million and 1.6 million parameters more, a third more time."""
    ragged, whole = (
        replace(
            MODEL,
            hidden_size=h,
            ffn_size=4 * h,
            num_heads=h // 144,
            num_kv_heads=h // 144,
            head_dim=144,
            gated_mlp=False,
        )
        for h in (14400, 13824)
    )
    ratio = block_seconds(model=ragged, tp=8) / block_seconds(model=whole, tp=8)
    assert 1.3 < ratio / (14400 / 13824) ** 2 < 1.5
    odd = replace(whole, ffn_size=whole.ffn_size + 8)  # rows of 16 bytes beyond whole lines, over eight ranks of two
    assert block_seconds(model=odd, tp=8) > 1.2 * block_seconds(model=whole, tp=8)


def test_units_at_half_rate_come_nearer_to_their_peak():
    fast = replace(DEVICE, peak_flops=dict.fromkeys(DEVICE.peak_flops, 250e12))
    half = replace(DEVICE, peak_flops=dict.fromkeys(DEVICE.peak_flops, 125e12))
    assert 125e12 / 108 < 1.4e12 < 250e12 / 108
    assert block_seconds(half) < 1.75 * block_seconds(fast)


def test_attention_without_fused_kernels_moves_its_scores():
    plain = replace(JOB, flash_attention=False)
    assert block_seconds(job=plain) > 1.2 * block_seconds()
    assert block_seconds(job=plain, model=replace(MODEL, attention_dropout=0.1)) > 1.02 * block_seconds(job=plain)
    odd = replace(MODEL, head_dim=108, num_heads=38, num_kv_heads=38)  # heads of 216 bytes, no multiple of 16
    even = replace(odd, head_dim=112)
    assert block_seconds(job=plain, model=odd) > 1.3 * block_seconds(job=plain, model=even)


@pytest.mark.parametrize("generation", ["ampere", "hopper", "blackwell", "never-heard-of"])
def test_every_generation_is_priced(generation):
    device = replace(DEVICE, generation=generation, peak_flops={**DEVICE.peak_flops, DType.FP8: 624e12})
    wide = make(cluster=make_cluster(device=device))
    narrow = make(replace(JOB, precision=Precision(compute=DType.FP8)), cluster=make_cluster(device=device))
    assert 0 < price(narrow).time < price(wide).time


def test_an_unknown_generation_has_the_widest_band():
    bands = [
        make(cluster=make_cluster(device=replace(DEVICE, generation=name))).efficiency.band
        for name in ("ampere", "hopper", "blackwell", "never-heard-of")
    ]
    assert max(bands) == bands[-1]


def test_tensor_parallelism_over_the_network_is_slower():
    inside, across = make(cluster=make_cluster(1)), make(cluster=make_cluster(2))
    assert price(across, tp=16).forward_s["tp_comm"] > 1.4 * price(inside, tp=8).forward_s["tp_comm"]


def test_model_flops_are_six_per_parameter_and_token():
    linear = 6 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096) * 64 * 4096
    attention = 6 * 64 * 32 * 4096**2 * 4096
    assert make().step_flops() == pytest.approx(linear + attention, rel=1e-3)


def test_the_graph_of_a_job_reaches_a_sensible_utilization():
    """LLaMA-like 7B models train at 50-70% of an A100's peak (Megatron-LM README, LLM Foundry tables)."""
    model = make(cluster=make_cluster(1))
    strategy = Strategy(dp=8, zero=1)
    layers = build_graph(MODEL).layers
    costs = [model.layer_cost(x.type, strategy, samples=1, pp=1, num_microbatches=8) for x in layers]
    seconds = sum(8 * cost.time + cost.step for cost in costs)
    assert 0.45 < model.step_flops() / seconds / 8 / 312e12 < 0.75


LAYOUTS = [
    Layout(tp=tp, cp=cp, dp=16 // tp // cp, sequence_parallel=sequence)
    for tp in (1, 2, 4, 8, 16)
    for cp in (1, 2, 4)
    for sequence in (False, True)
    if tp * cp <= 16 and (tp > 1 or not sequence)
]
LAYOUT = st.sampled_from(LAYOUTS)


@settings(max_examples=300)
@given(LAYOUT, LAYOUT, LAYOUT)
def test_resharding_is_a_metric(a, b, c):
    model = make()

    def distance(x: Layout, y: Layout) -> float:
        return model.reshard_seconds(x, y, microbatch=16)

    assert distance(a, a) == 0
    assert a == b or distance(a, b) > 0
    assert math.isclose(distance(a, b), distance(b, a), rel_tol=1e-12)
    assert distance(a, c) <= (distance(a, b) + distance(b, c)) * (1 + 1e-12)


def test_sending_across_stages():
    model = make()
    plain = Layout(tp=1, cp=1, dp=8, sequence_parallel=False)
    split = Layout(tp=8, cp=1, dp=1, sequence_parallel=True)
    assert model.send_seconds(plain, plain, microbatch=8, pp=1) == 0
    same = model.send_seconds(plain, plain, microbatch=8, pp=2)
    assert 0 < same < model.send_seconds(plain, split, microbatch=8, pp=2)
    assert model.send_seconds(plain, plain, microbatch=16, pp=2) > same


def test_pricing_a_trillion_parameters_is_fast():
    """Every strategy of GPT 1T on 3,072 devices in at most a CPU second; it takes about a tenth of one."""
    gpt = replace(MODEL, num_layers=128, hidden_size=25600, ffn_size=102400, num_heads=160, num_kv_heads=160)
    model = make(replace(JOB, global_batch=3072), replace(gpt, head_dim=160, gated_mlp=False), make_cluster(384))
    start = time.process_time()
    priced = 0
    for pp in (1, 2, 4, 8, 16, 32, 64, 128):
        for tp in (1, 2, 4, 8):
            for zero in range(4):
                for recompute in Recompute:
                    for samples in (1, 2, 4, 8):
                        for layer in (BLOCK, HEAD, EMBEDDING):
                            axes = {"tp": tp, "dp": 3072 // pp // tp, "zero": zero, "recompute": recompute}
                            price(model, layer, samples=samples, pp=pp, sequence_parallel=tp > 1, **axes)
                            priced += 1
    assert priced == 4608
    assert time.process_time() - start < 1.0


def test_clocks_fall_with_the_power_limit():
    def seconds(watts: float | None) -> float:
        return price(make(cluster=make_cluster(1, device=replace(DEVICE, watts=watts)))).forward

    peak = max(DEVICE.peak_flops.values())
    roomy = seconds(peak / 0.5e12)
    assert seconds(None) == roomy
    assert roomy < seconds(peak / 1.5e12) < seconds(peak / 3e12) < 3 * roomy


def test_gradients_of_logits_do_not_lower_clocks():
    """A stage's head loses less to the power limit than its blocks, and nothing in backward."""

    def slowdown(layer: LayerType) -> tuple[float, float]:
        roomy, tight = (
            price(make(cluster=make_cluster(1, device=replace(DEVICE, watts=watts))), layer, samples=8)
            for watts in (None, max(DEVICE.peak_flops.values()) / 3e12)
        )
        return tight.forward / roomy.forward, tight.backward / roomy.backward

    block, head = slowdown(BLOCK), slowdown(HEAD)
    assert min(block) > 1.5
    assert head[0] > 1.5
    assert head[1] < 1.1


def test_launches_take_longer_on_older_hosts():
    """Layers so small that launching takes all the time, and CUDA graphs, which launch nothing."""
    small = replace(MODEL, hidden_size=512, ffn_size=2048, num_heads=8, num_kv_heads=8, head_dim=64)
    job = replace(JOB, seq_length=128)

    def seconds(host: float, *, graphs: bool = False) -> float:
        cluster = make_cluster(1, device=replace(DEVICE, host=host))
        runtime = Runtime(cuda_graphs=graphs)
        model = CostModel(small, cluster, job, CAPABILITIES[Target.ANY], runtime=runtime)
        return model.layer_cost(BLOCK, Strategy(dp=8), samples=1, pp=1, num_microbatches=8).forward

    assert seconds(1.45) / seconds(1.0) == pytest.approx(1.45, rel=1e-3)
    assert seconds(1.45, graphs=True) == seconds(1.0, graphs=True) < seconds(1.0) / 4


def test_what_an_engine_does_for_experts_saves_time():
    moe = Moe(num_experts=32, top_k=4, expert_ffn_size=1024)
    expert, strategy = LayerType(kind=LayerKind.BLOCK, moe=True), Strategy(dp=16, ep=16)

    def seconds(**engine: bool) -> float:
        runtime = Runtime(**engine)
        model = CostModel(replace(MODEL, moe=moe), make_cluster(), JOB, CAPABILITIES[Target.ANY], runtime=runtime)
        return model.layer_cost(expert, strategy, samples=1, pp=1, num_microbatches=8).time

    plain = seconds()
    assert seconds(overlap_experts=True) < plain
    assert seconds(cuda_graphs=True) < plain
    assert seconds(cuda_graphs=True, overlap_experts=True) < seconds(cuda_graphs=True)


def test_selective_recomputation_repeats_the_modules_it_names():
    def seconds(*modules: str) -> float:
        runtime = Runtime(recompute_modules=frozenset(modules))
        model = CostModel(MODEL, make_cluster(), JOB, CAPABILITIES[Target.ANY], runtime=runtime)
        again = Strategy(recompute=Recompute.SELECTIVE)
        return model.layer_cost(BLOCK, again, samples=1, pp=1, num_microbatches=8).backward_s.get("recompute", 0.0)

    assert seconds("layernorm") == 0
    assert 0 < seconds("core_attn") < seconds("mlp")
    assert seconds("core_attn", "mlp") == pytest.approx(seconds("core_attn") + seconds("mlp"))


def deepspeed_costs(zero: int, *, pp: int = 1, asked: bool = True, model: Model = MODEL, samples: int = 1):
    """A block of eight replicas over two nodes, which have too little network to hide gradients."""
    engine = replace(CAPABILITIES[Target.DEEPSPEED], overlap_gradient_reduce=asked)
    costs = CostModel(model, make_cluster(), JOB, engine)
    return costs.layer_cost(BLOCK, Strategy(dp=8, zero=zero), samples=samples, pp=pp, num_microbatches=4)


def test_deepspeed_reduces_gradients_of_zero_for_all_and_hides_only_those():
    none, first, asked_not = deepspeed_costs(0), deepspeed_costs(1), deepspeed_costs(1, asked=False)
    in_pipeline = deepspeed_costs(1, pp=2)
    # an all-reduce is two gathers; the gather of parameters never hides
    assert asked_not.step_s[DP_COMM] == pytest.approx(1.5 * none.step_s[DP_COMM])
    assert in_pipeline.step_s[DP_COMM] == pytest.approx(asked_not.step_s[DP_COMM])
    assert none.step_s[DP_COMM] / 2 < first.step_s[DP_COMM] < none.step_s[DP_COMM]
    # ZeRO-2 reduces in every micro-batch
    second = deepspeed_costs(2, asked=False)
    assert 4 * second.backward_s[ZERO_COMM] > 3 * none.step_s[DP_COMM]


def test_zero_3_keeps_the_cpu_busy_and_small_models_gathered():
    small = replace(MODEL, hidden_size=512, ffn_size=1408, num_heads=8, num_kv_heads=8, head_dim=64)
    first, third = (deepspeed_costs(zero, model=small) for zero in (1, 3))
    assert third.forward_s[COMPUTE] > 2.5 * first.forward_s[COMPUTE]
    busy = [deepspeed_costs(zero, samples=4).forward_s[COMPUTE] for zero in (1, 3)]
    assert busy[1] == pytest.approx(busy[0], rel=0.05)
    # a model within the reuse distance is gathered once a micro-batch, a large one twice
    whole = CostModel(small, make_cluster(), JOB, CAPABILITIES[Target.DEEPSPEED], runtime=Runtime())
    again = whole.layer_cost(BLOCK, Strategy(dp=8, zero=3), samples=1, pp=1, num_microbatches=4)
    kept = CostModel(
        small, make_cluster(), JOB, CAPABILITIES[Target.DEEPSPEED], runtime=Runtime(reused_parameters=10**9)
    ).layer_cost(BLOCK, Strategy(dp=8, zero=3), samples=1, pp=1, num_microbatches=4)
    assert kept.backward_s[ZERO_COMM] < again.backward_s[ZERO_COMM]
    assert kept.forward_s[ZERO_COMM] == again.forward_s[ZERO_COMM]


def test_automatic_tensor_parallelism_reduces_more_and_splits_less():
    """Five linear layers of a Llama block are cut along their outputs; logits are gathered, the embedding is whole."""
    model = replace(MODEL, family="llama", tied_embeddings=False)
    engine, megatron = (
        CostModel(model, make_cluster(1), JOB, CAPABILITIES[target]) for target in (Target.DEEPSPEED, Target.MEGATRON)
    )

    def cost(costs: CostModel, layer: LayerType):
        return costs.layer_cost(layer, Strategy(tp=4, dp=2), samples=1, pp=1, num_microbatches=8)

    block = cost(engine, BLOCK)
    assert block.backward_s[TP_COMM] / block.forward_s[TP_COMM] == pytest.approx(5 / 2)
    # 32,000 is padded to 32,256 for Megatron's four ranks
    word, padded = 32000 * 4096, 32256 * 4096
    assert cost(engine, EMBEDDING).static_bytes[PARAMETERS] == 2 * word
    assert cost(megatron, EMBEDDING).static_bytes[PARAMETERS] == 2 * padded / 4
    assert cost(engine, HEAD).static_bytes[PARAMETERS] == pytest.approx(2 * word / 4, rel=0.001)
    logits = JOB.seq_length * 32000
    assert cost(engine, HEAD).transient_bytes > 14 * logits > 2 * cost(megatron, HEAD).transient_bytes
    assert TP_COMM not in cost(engine, EMBEDDING).forward_s
    assert cost(engine, HEAD).forward_s[TP_COMM] > cost(megatron, EMBEDDING).forward_s[TP_COMM]
