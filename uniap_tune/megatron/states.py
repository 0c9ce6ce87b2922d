"""Rules about optimizer states, sharding, recomputation and offloading; see :mod:`uniap_tune.megatron.rules`."""

from __future__ import annotations

from uniap_tune.megatron.facts import CONNECTIONS, MegatronFacts
from uniap_tune.megatron.rule import rule

# -- states -----------------------------------------------------------------------------------------------------------


@rule("arg:1024")
def param_gather_overlap(facts: MegatronFacts) -> str:
    """Overlapping the parameter gather needs sharded states and overlapped gradients."""
    if not facts.on("overlap-param-gather"):
        return ""
    if facts.zero == 0:
        return "--overlap-param-gather needs --use-distributed-optimizer"
    return "" if facts.on("overlap-grad-reduce") else "--overlap-param-gather needs --overlap-grad-reduce"


@rule("arg:1169")
def fsdp_checkpoint(facts: MegatronFacts) -> str:
    """Megatron-FSDP writes one format of checkpoints."""
    if facts.on("use-megatron-fsdp") and facts.text("ckpt-format") != "fsdp_dtensor":
        return "--use-megatron-fsdp needs --ckpt-format fsdp_dtensor"
    return ""


@rule("arg:1166")
def fsdp_queues(facts: MegatronFacts) -> str:
    """Megatron-FSDP needs more than one work queue for its gathers to overlap."""
    if facts.on("use-megatron-fsdp") and facts.environment.get(CONNECTIONS) == "1":
        return f"--use-megatron-fsdp needs {CONNECTIONS} other than 1"
    return ""


@rule("arg:1095")
def fp8_gather(facts: MegatronFacts) -> str:
    """Gathering parameters in FP8 needs sharded states."""
    if facts.on("fp8-param-gather") and facts.zero == 0:
        return "--fp8-param-gather needs --use-distributed-optimizer"
    return ""


@rule("optimizer/__init__.py:1057", accepted=True)
def precision_aware(facts: MegatronFacts) -> str:
    """Narrow optimizer states live in the distributed optimizer."""
    if facts.on("use-precision-aware-optimizer") and facts.zero == 0:
        return "--use-precision-aware-optimizer needs --use-distributed-optimizer"
    return ""


@rule("optimizer/distrib_optimizer.py:514", accepted=True)
def sharded_optimizer(facts: MegatronFacts) -> str:
    """The distributed optimizer runs Adam."""
    if facts.zero and facts.text("optimizer") == "sgd":
        return "--optimizer sgd excludes --use-distributed-optimizer, which runs Adam alone"
    return ""


@rule("arg:1884")
def offloaded_optimizer(facts: MegatronFacts) -> str:
    """Offloaded optimizer states need the precision-aware optimizer."""
    if facts.on("optimizer-cpu-offload") and not facts.on("use-precision-aware-optimizer"):
        return "--optimizer-cpu-offload needs --use-precision-aware-optimizer"
    return ""


@rule("ps:924", accepted=True)
def optimizer_instances(facts: MegatronFacts) -> str:
    """Optimizer instances divide the data-parallel ranks."""
    instances, ranks = facts.count("num-distributed-optimizer-instances"), facts.dp * facts.cp
    return f"{instances} optimizer instances do not divide dp * cp = {ranks}" if ranks % instances else ""


# -- activations ------------------------------------------------------------------------------------------------------


@rule("TC:1911-1923")
def full_needs_method(facts: MegatronFacts) -> str:
    """Full recompute needs a method and a number of layers."""
    if facts.recompute == "full" and len(facts.recompute_details) < 2:
        return "--recompute-granularity full needs --recompute-method and --recompute-num-layers"
    return ""


@rule("arg:1425, TC:1925-1931")
def selective_forbids_method(facts: MegatronFacts) -> str:
    """Selective recompute has neither."""
    if facts.recompute == "selective" and facts.recompute_details:
        return f"selective recompute excludes --{facts.recompute_details[0]}"
    return ""


@rule("transformer_block.py, _checkpointed_forward", accepted=True)
def recompute_fits_chunk(facts: MegatronFacts) -> str:
    """Megatron clamps the number of recomputed layers to those of a chunk."""
    asked = facts.count("recompute-num-layers", 0)
    if facts.recompute != "full" or not asked:
        return ""
    try:
        most = max(facts.chunks)
    except ValueError:  # what is wrong with the split another rule says
        return ""
    return f"--recompute-num-layers {asked} is more than the {most} layers of a chunk" if asked > most else ""


@rule("TC:1884-1898")
def offloaded_layers(facts: MegatronFacts) -> str:
    """Offloaded activations exclude pipelines and recompute, and leave a layer."""
    layers = facts.count("cpu-offloading-num-layers", 0)
    if not layers:
        return ""
    if facts.pp > 1:
        return "--cpu-offloading-num-layers excludes pipeline parallelism"
    if facts.recompute:
        return "--cpu-offloading-num-layers excludes recompute"
    return "" if layers < facts.num_layers else f"--cpu-offloading-num-layers must be below {facts.num_layers}"
