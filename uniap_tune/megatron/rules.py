"""What Megatron-LM refuses, and what it accepts and then dies of: one function a rule, with its source line.

``arg:N`` is a line of megatron/training/arguments.py, ``TC:N`` of transformer_config.py, ``ps:N`` of parallel_state.py,
``sch:N`` of pipeline_parallel/schedules.py, all of Megatron-LM commit d98e8a6. A rule marked *accepted* is one that
``validate_args`` lets pass although the run fails, or does something else than was asked, afterwards.
"""

from __future__ import annotations

import uniap_tune.megatron.states  # noqa: F401 - registers its rules
from uniap_tune.megatron.facts import CONNECTIONS, MegatronFacts
from uniap_tune.megatron.layout import first_and_last
from uniap_tune.megatron.rule import RULES, Violation, rule

__all__ = ["RULES", "Violation", "violations"]

_VIRTUAL = ("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank")
_ENDS = ("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers")
_ACCOUNTS = ("account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split")


def violations(facts: MegatronFacts) -> tuple[Violation, ...]:
    """Every rule that a configuration breaks."""
    found = []
    for known in RULES:
        message = known.check(facts)
        if message:
            found.append(Violation(known, message))
    return tuple(found)


def _given(facts: MegatronFacts, names: tuple[str, ...]) -> list[str]:
    return [f"--{name}" for name in names if facts.arguments.get(name)]


# -- degrees ----------------------------------------------------------------------------------------------------------


@rule("arg:432")
def grid_divides_world(facts: MegatronFacts) -> str:
    """TP x PP x CP divides the number of devices."""
    tp, pp, cp, world = facts.tp, facts.pp, facts.cp, facts.world
    return f"tp({tp}) * pp({pp}) * cp({cp}) does not divide {world} devices" if world % (tp * pp * cp) else ""


@rule("TC:1446")
def heads_divide(facts: MegatronFacts) -> str:
    """TP divides the attention heads."""
    heads = facts.count("num-attention-heads")
    return f"{heads} attention heads do not divide over tp({facts.tp})" if heads % facts.tp else ""


@rule("TC:1461")
def groups_divide(facts: MegatronFacts) -> str:
    """Key-value heads are a multiple or a divisor of TP."""
    if not facts.on("group-query-attention"):
        return ""
    groups, tp = facts.count("num-query-groups"), facts.tp
    return f"{groups} query groups are no multiple or divisor of tp({tp})" if groups % tp and tp % groups else ""


@rule("tensor_parallel/layers.py, ColumnParallelLinear", accepted=True)
def feed_forward_divides(facts: MegatronFacts) -> str:
    """TP divides the MLP's width."""
    width = facts.optional("ffn-hidden-size")
    return f"ffn-hidden-size {width} does not divide over tp({facts.tp})" if width and width % facts.tp else ""


@rule("tensor_parallel/mappings.py, _reduce_scatter_along_first_dim", accepted=True)
def sequence_divides(facts: MegatronFacts) -> str:
    """With sequence parallelism TP divides a rank's part of the sequence."""
    length, ways = facts.count("seq-length"), facts.tp * facts.cp
    if facts.sequence_parallel and length % ways:
        return f"--sequence-parallel: a sequence of {length} does not divide over tp * cp = {ways}"
    return ""


@rule("arg:1441")
def overlap_needs_sequence_parallel(facts: MegatronFacts) -> str:
    """Tensor-parallel overlap works on sequence-parallel tensors."""
    if facts.on("tp-comm-overlap") and not facts.sequence_parallel:
        return "--tp-comm-overlap needs --sequence-parallel and tensor parallelism"
    return ""


@rule("training/determinism.py, ARG_VALUES_REQUIRED_FOR_DETERMINISM")
def overlap_is_not_deterministic(facts: MegatronFacts) -> str:
    """Deterministic mode excludes tensor-parallel overlap."""
    if facts.on("deterministic-mode") and facts.on("tp-comm-overlap"):
        return "--deterministic-mode and --tp-comm-overlap exclude each other"
    return ""


@rule("arg:1477")
def one_queue(facts: MegatronFacts) -> str:
    """Before Blackwell, TP and CP need CUDA_DEVICE_MAX_CONNECTIONS=1, so that collectives start in order."""
    if facts.tp * facts.cp == 1 or not facts.single_queue or facts.zero > 1:
        return ""
    value = facts.environment.get(CONNECTIONS)
    return "" if value == "1" else f"{CONNECTIONS} is {value or 'not set'}; tensor and context parallelism need 1"


@rule("arg:1336")
def context_divides(facts: MegatronFacts) -> str:
    """2 x CP divides the sequence: each rank has a chunk of the front and one of the back."""
    length, cp = facts.count("seq-length"), facts.cp
    return f"a sequence of {length} does not divide over 2 * cp({cp})" if cp > 1 and length % (2 * cp) else ""


@rule("TransformerEngine, attention with cp_comm_type a2a", accepted=True)
def context_heads(facts: MegatronFacts) -> str:
    """All-to-all context parallelism gives every rank some heads."""
    if facts.cp == 1 or facts.text("cp-comm-type").split(" ")[0] != "a2a":
        return ""
    heads, ways = facts.count("num-attention-heads"), facts.tp * facts.cp
    return f"--cp-comm-type a2a: {heads} heads do not divide over tp * cp = {ways}" if heads % ways else ""


@rule("num_microbatches_calculator.py")
def batch_divides(facts: MegatronFacts) -> str:
    """Micro-batch x DP divides the global batch."""
    samples = facts.micro_batch * facts.dp
    if facts.global_batch % samples:
        return f"global-batch-size {facts.global_batch} is no multiple of micro-batch x dp = {samples}"
    return ""


@rule("num_microbatches_calculator.py", accepted=True)
def rampup_divides(facts: MegatronFacts) -> str:
    """Micro-batch x DP divides the first batch and the steps of a batch-size ramp."""
    words = facts.text("rampup-batch-size").split()
    samples = facts.micro_batch * facts.dp
    if len(words) < 2 or not all(word.isdecimal() for word in words[:2]):
        return ""
    if any(int(word) % samples for word in words[:2]):
        return f"--rampup-batch-size {words[0]} {words[1]}: not multiples of micro-batch x dp = {samples}"
    return ""


# -- pipeline ---------------------------------------------------------------------------------------------------------


@rule("arg:997")
def layers_divide(facts: MegatronFacts) -> str:
    """PP divides the layers, unless the split is given otherwise."""
    if _given(facts, ("pipeline-model-parallel-layout", *_ENDS, *_ACCOUNTS)) or facts.num_layers % facts.pp == 0:
        return ""
    return f"{facts.num_layers} layers do not divide over pp({facts.pp})"


@rule("arg:928")
def layout_excludes_virtual(facts: MegatronFacts) -> str:
    """A layout says the virtual stages itself."""
    others = _given(facts, _VIRTUAL)
    if facts.text("pipeline-model-parallel-layout") and others:
        return f"--pipeline-model-parallel-layout excludes {' and '.join(others)}"
    return ""


@rule("TC:2245")
def layout_excludes_ends(facts: MegatronFacts) -> str:
    """A layout says the first and last stage itself."""
    others = _given(facts, (*_ENDS, *_ACCOUNTS))
    if facts.text("pipeline-model-parallel-layout") and others:
        return f"--pipeline-model-parallel-layout excludes {' and '.join(others)}"
    return ""


@rule("arg:945, pipeline_parallel_layer_layout.py:283-321")
def layout_is_whole(facts: MegatronFacts) -> str:
    """A layout has the grammar, a multiple of PP stages, E first, L last, and all the layers."""
    try:
        layout = facts.layout
    except ValueError as error:
        return f"--pipeline-model-parallel-layout: {error}"
    faults = layout.faults(facts.num_layers, facts.pp) if layout is not None else ""
    return f"--pipeline-model-parallel-layout: {faults}" if faults else ""


@rule("TC:2341-2353")
def middle_divides(facts: MegatronFacts) -> str:
    """What the first and last stage leave divides over the others."""
    if not _given(facts, _ENDS) or facts.text("pipeline-model-parallel-layout"):
        return ""
    first, last = (facts.optional(name) for name in _ENDS)
    others = facts.pp - (first is not None) - (last is not None)
    left = facts.num_layers - (first or 0) - (last or 0)
    if left < 0 or others < 0 or bool(left) != bool(others) or (others > 0 and left % others):
        return f"{left} layers are left for {others} middle stages, which does not divide"
    return ""


@rule("TC:2370-2415")
def accounted_divides(facts: MegatronFacts) -> str:
    """Layers plus embedding and loss divide over the stages; first and last counts are excluded."""
    counted = _given(facts, _ACCOUNTS)
    if not counted:
        return ""
    if _given(facts, _ENDS):
        return f"{counted[0]} excludes {_given(facts, _ENDS)[0]}"
    total = facts.num_layers + len(counted)
    return (
        f"{total} layers (with {' and '.join(counted)}) do not divide over pp({facts.pp})" if total % facts.pp else ""
    )


@rule("arg:1000")
def virtual_needs_pipeline(facts: MegatronFacts) -> str:
    """Interleaving needs two stages, three without overlapped sends."""
    given = _given(facts, _VIRTUAL)
    least = 3 if facts.on("no-overlap-p2p-communication") else 2
    return f"{given[0]} needs at least {least} pipeline stages" if given and facts.pp < least else ""


@rule("arg:928")
def one_virtual_flag(facts: MegatronFacts) -> str:
    """Virtual stages are said once."""
    given = _given(facts, _VIRTUAL)
    return f"{' and '.join(given)} exclude each other" if len(given) > 1 else ""


@rule("arg:955")
def ends_need_virtual_count(facts: MegatronFacts) -> str:
    """With a first or last stage of its own size, virtual stages are counted, not sized."""
    ends = _given(facts, _ENDS)
    return f"{ends[0]} excludes --{_VIRTUAL[0]}: give --{_VIRTUAL[1]}" if ends and facts.count(_VIRTUAL[0], 0) else ""


@rule("arg:972")
def virtual_size_divides(facts: MegatronFacts) -> str:
    """The size of a virtual stage divides a stage's layers."""
    size = facts.count(_VIRTUAL[0], 0)
    if not size or facts.text("pipeline-model-parallel-layout"):
        return ""
    share = (facts.num_layers + len(_given(facts, _ACCOUNTS))) // facts.pp
    return f"{share} layers of a stage are no multiple of {size} a virtual stage" if share % size else ""


@rule("transformer_block.py, get_num_layers_to_build", accepted=True)
def virtual_count_divides(facts: MegatronFacts) -> str:
    """The number of virtual stages divides a stage's layers."""
    chunks = facts.count(_VIRTUAL[1], 0)
    if not chunks or _given(facts, ("pipeline-model-parallel-layout", *_ENDS)):
        return ""
    share = (facts.num_layers + len(_given(facts, _ACCOUNTS))) // facts.pp
    return f"{share} layers of a stage do not divide over {chunks} virtual stages" if share % chunks else ""


@rule("TC:2306-2367")
def virtual_count_divides_ends(facts: MegatronFacts) -> str:
    """It does so too where the first or the last stage has its own number."""
    chunks = facts.count(_VIRTUAL[1], 0)
    if not chunks or not _given(facts, _ENDS) or facts.text("pipeline-model-parallel-layout"):
        return ""
    try:
        stages = first_and_last(facts.num_layers, facts.pp, *(facts.optional(name) for name in _ENDS))
    except ValueError:  # what is wrong with the split another rule says
        return ""
    wrong = next((size for size in stages if size % chunks), None)
    return "" if wrong is None else f"{wrong} layers of a stage do not divide over {chunks} virtual stages"


@rule("sch:1160", accepted=True)
def group_size(facts: MegatronFacts) -> str:
    """Interleaved micro-batches come in groups of N, PP <= N <= M, and the last group has PP at least."""
    size = facts.optional("microbatch-group-size-per-virtual-pipeline-stage")
    if size is None or _virtual(facts) == 1:
        return ""
    many = facts.microbatches
    if not facts.pp <= size <= many or 0 < many % size < facts.pp:
        return f"groups of {size} micro-batches do not suit {many} micro-batches and pp({facts.pp})"
    return ""


@rule("sch:1160", accepted=True)
def enough_microbatches(facts: MegatronFacts) -> str:
    """Interleaving needs as many micro-batches as stages, and the last group has PP at least."""
    if _virtual(facts) == 1 or "microbatch-group-size-per-virtual-pipeline-stage" in facts.arguments:
        return ""
    many, pp = facts.microbatches, facts.pp
    if many < pp or 0 < many % pp < pp:
        return f"{many} micro-batches cannot be interleaved over pp({pp}): not a multiple of it"
    return ""


def _virtual(facts: MegatronFacts) -> int:
    try:
        return facts.virtual
    except ValueError:  # what is wrong with the layout another rule says
        return 1


# -- experts ----------------------------------------------------------------------------------------------------------


@rule("arg:1657")
def experts_divide(facts: MegatronFacts) -> str:
    """EP divides the experts."""
    experts, ep = facts.count("num-experts", 0), facts.ep
    return f"{experts} experts do not divide over ep({ep})" if experts and experts % ep else ""


@rule("TC:1595")
def expert_parallelism_needs_experts(facts: MegatronFacts) -> str:
    """EP needs experts."""
    return f"ep({facts.ep}) without --num-experts" if facts.ep > 1 and not facts.count("num-experts", 0) else ""


@rule("ps:881", accepted=True)
def expert_grid_divides_world(facts: MegatronFacts) -> str:
    """The experts' own grid, ETP x EP x PP, divides the number of devices."""
    if not facts.count("num-experts", 0):
        return ""
    grid = facts.etp * facts.ep * facts.pp
    text = f"etp({facts.etp}) * ep({facts.ep}) * pp({facts.pp})"
    return f"{text} does not divide {facts.world} devices" if facts.world % grid else ""


@rule("TC:2611")
def expert_bias(facts: MegatronFacts) -> str:
    """Experts with biases cannot be split by tensor parallelism."""
    if facts.count("num-experts", 0) and facts.etp > 1 and not facts.on("disable-bias-linear"):
        return f"experts with biases need --expert-tensor-parallel-size 1, not {facts.etp}"
    return ""


@rule("moe/moe_layer.py:636", accepted=True)
def experts_need_sequence_parallel(facts: MegatronFacts) -> str:
    """Training experts with TP needs sequence parallelism."""
    if facts.count("num-experts", 0) and facts.tp > 1 and not facts.on("sequence-parallel"):
        return "experts with tensor parallelism need --sequence-parallel"
    return ""


@rule("TC:3002-3023")
def expert_overlap(facts: MegatronFacts) -> str:
    """Overlapping the experts' all-to-all needs EP, interleaving with PP, and no full recompute."""
    if not facts.on("overlap-moe-expert-parallel-comm"):
        return ""
    if facts.ep == 1:
        return "--overlap-moe-expert-parallel-comm needs expert parallelism"
    if facts.pp > 1 and _virtual(facts) == 1:
        return "--overlap-moe-expert-parallel-comm needs virtual stages in a pipeline"
    if facts.recompute == "full":
        return "--overlap-moe-expert-parallel-comm excludes full recompute"
    return ""
