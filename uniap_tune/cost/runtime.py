"""Properties of the training software that neither the model nor the hardware determines.

A plan assumes what its target's current release does by default; a record of somebody's run may say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from uniap_tune.autotp import Vocabulary, column_layers, vocabulary
from uniap_tune.spec import Cluster, Model
from uniap_tune.strategy import Capabilities, Target

# Modules that selective recomputation can name (Megatron's --recompute-modules).
CORE_ATTENTION = "core_attn"
NORMS = "layernorm"
LATENT_UP = "mla_up_proj"
MLP = "mlp"
EXPERTS = "moe"
EXPERT_ACTIVATION = "moe_act"
SHARED_EXPERTS = "shared_experts"
RECOMPUTE_MODULES = frozenset({CORE_ATTENTION, NORMS, LATENT_UP, MLP, EXPERTS, EXPERT_ACTIVATION, SHARED_EXPERTS})


# CPU seconds of one launch on the host of an H100 [Empirical]: TransformerEngine's modules around fewer kernels
# (SimuMax's Llama-3 70B at tp 8 on B200; H100 runs of NeMo and Megatron-Bridge 7e-5 to 9e-5, Megatron-LM's functional
# tests 7e-5 to 11e-5); megatron-core's own layers (the same tests); Megatron-LM's before 2023, traced under
# Megatron-DeepSpeed beside an A100; modules of plain PyTorch, and of transformers.
_ENGINE_LAUNCH = 8.0e-5
MEGATRON_LAUNCH_S = 4.0e-5
_MEGATRON_2021_LAUNCH = 2.255e-5
_PYTORCH_LAUNCH = 8.3e-6
_TRANSFORMERS_LAUNCH = 1.5e-5


# Keys up to which softmax is fused: TransformerEngine since 1.3 (softmax.py, is_kernel_available: below 16384),
# megatron-core's own layers (fusions/fused_softmax.py), Megatron-LM until 2023
# (fused_kernels/scaled_upper_triang_masked_softmax.h).
_ENGINE_SOFTMAX = 16_383
MEGATRON_SOFTMAX = 4096
_MEGATRON_2021_SOFTMAX = 2048


@dataclass(frozen=True, slots=True)
class Loss:
    """Bytes that a 16-bit logit takes while the loss is computed, and moves through memory, forward and backward."""

    held: float
    moved: float


# Counted operator by operator. Megatron's own cross-entropy works in place on an fp32 copy (megatron/core/
# tensor_parallel/cross_entropy.py: widened 6, maximum 4, subtracted 8, exponential 8, summed 4, divided 8, scaled 8,
# narrowed 6); fused by the compiler in four passes, with a copy for the gradient (fusions/fused_cross_entropy.py);
# TransformerEngine's kernels read logits twice, write gradients over them and scale those (triton/cross_entropy.py).
MEGATRON_LOSS = Loss(held=6.0, moved=52.0)
FUSED_LOSS = Loss(held=10.0, moved=40.0)
ENGINE_LOSS = Loss(held=4.0, moved=10.0)
# transformers widens them, and PyTorch's cross-entropy makes log-probabilities, their gradient and that of the widened
# logits (loss_utils.py, ForCausalLMLoss), beside the logits themselves as long as a script holds the model's output.
TRANSFORMERS_LOSS = Loss(held=14.0, moved=44.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How the engine executes a step.

    Attributes:
        cuda_graphs: kernels are replayed from CUDA graphs, so launching them costs no CPU time.
        overlap_experts: the exchange of experts' tokens runs behind the computation of another micro-batch (Megatron's
            ``--overlap-moe-expert-parallel-comm``).
        overlap_tensor: GEMMs run while the activations they need or make are still on their way (TransformerEngine's
            user buffers, Megatron's ``--tp-comm-overlap``).
        fused_kernels: norms, activations, dropout and residuals run as few fused kernels (TransformerEngine); without,
            as separate kernels of PyTorch or of its compiler (Megatron-LM before 2023).
        launch_s: CPU seconds to launch one kernel on the host of an H100, the modules around it included.
        kernel_s: GPU seconds a kernel takes beyond its work, to start and to drain.
        rank_wait_s: seconds that a collective waits for the rank whose CPU launches it last, for each doubling of its
            ranks, where launches take all the time; less in the proportion in which the GPU takes longer.
        grouped_experts: the GEMMs of a rank's experts run as one operator (Megatron's ``--moe-grouped-gemm``).
        recompute_modules: what selective recomputation repeats.
        offload_modules: modules whose tensors wait in host memory (Megatron's ``--offload-modules``).
        narrow_parameters: 8- and 4-bit training keeps parameters of linear layers in that format alone (Megatron's
            ``--fp8-param-gather``), else beside 16-bit ones.
        recompute_share: part of the forward pass that full recomputation repeats.
        previous_attention: fused attention is FlashAttention 2, written for Ampere.
        flash_share: rate of fused attention relative to the generation's best kernels.
        loss: how the cross-entropy of the logits is computed.
        cast_traffic: bytes moved to quantize for 8- and 4-bit multiplications, relative to kernels that also transpose.
        vocab_multiple: the vocabulary is padded to a multiple of this times tp (Megatron: 128); 1: not padded.
        pads_without_tp: the vocabulary is padded at tp 1 too.
        optimizer_instances: copies of the sharded optimizer states among the data-parallel ranks (Megatron's
            ``--num-distributed-optimizer-instances``).
        loads_mask: the data loader makes an attention mask of every micro-batch (Megatron's default).
        deterministic: PyTorch's deterministic mode, for which cuBLAS needs workspaces of 32 MiB (:4096:8).
        gradient_fusion: weight gradients accumulate inside the GEMM; TransformerEngine then keeps a dummy gradient of
            every distinct weight, 2 bytes for each parameter of one layer.
        eager: norms, activation functions and rotary embeddings are written in operators of PyTorch, each of which
            moves and keeps what it works on (transformers' modules).
        keeps_scores: unfused attention keeps its scores beside their softmax, as separate operators do.
        softmax_length: keys up to which unfused attention scales, masks and normalizes in one kernel (0: never,
            Megatron's ``--no-masked-softmax-fusion``); beyond, these are operators of PyTorch.
        softmax_in_fp32: PyTorch's softmax computes and keeps 32 bits (Megatron's ``--attention-softmax-in-fp32``).
        deferred_gradients: micro-batches whose gradient of the output matrix waits until the pipeline is empty, 0 for
            all of them (Megatron's ``--defer-embedding-wgrad-compute``, ``--wgrad-deferral-limit``); ``None``: none.
        gradient_bucket: elements of a buffer in which gradients wait to be reduced, of which ZeRO-1 and 2 have two and
            ZeRO-3 one (DeepSpeed's ``reduce_bucket_size``); Megatron reduces gradients where they are.
        reused_parameters: gathered parameters that ZeRO-3 keeps between forward and backward, because they are needed
            again soon: DeepSpeed's ``stage3_max_live_parameters`` [Empirical], counted on its engine.
        fetch_launches: launches that it takes the CPU to fetch and release the parameters of one module under ZeRO-3,
            which DeepSpeed's hooks do for every module of the model, each way.
        scatters_borders: tensor-parallel ranks without sequence parallelism each send a part of what the next stage
            needs and gathers (Megatron-LM before 2023); since then each sends all of it.
        column_layers: linear layers of a block whose input's gradient tensor parallelism reduces (Megatron: the first
            of attention and of the MLP).
        vocabulary: how tensor-parallel ranks share the embedding, the output layer and the loss.
        band: least half-width of the 80% error band of a step time, whatever the GPU, as a fraction: how far runs of
            this software are from their predictions.
        transformer_engine: layers are TransformerEngine's; else Megatron's local ones, whose unfused attention keeps
            one s x s buffer for its matrix products.
    """

    cuda_graphs: bool = False
    overlap_experts: bool = False
    overlap_tensor: bool = False
    fused_kernels: bool = True
    launch_s: float = _ENGINE_LAUNCH
    kernel_s: float = 2.0e-6
    rank_wait_s: float = 0.0
    recompute_modules: frozenset[str] = frozenset({CORE_ATTENTION})
    grouped_experts: bool = True
    offload_modules: frozenset[str] = frozenset()
    narrow_parameters: bool = False
    recompute_share: float = 1.0
    previous_attention: bool = False
    flash_share: float = 1.0
    loss: Loss = MEGATRON_LOSS
    cast_traffic: float = 1.0
    vocab_multiple: int = 128
    pads_without_tp: bool = True
    optimizer_instances: int = 1
    loads_mask: bool = False
    deterministic: bool = False
    gradient_fusion: bool = True
    transformer_engine: bool = True
    eager: bool = False
    keeps_scores: bool = False
    softmax_length: int = _ENGINE_SOFTMAX
    softmax_in_fp32: bool = True
    deferred_gradients: int | None = None
    gradient_bucket: int = 0
    reused_parameters: int = 0
    fetch_launches: float = 0.0
    scatters_borders: bool = False
    column_layers: int = 2
    vocabulary: Vocabulary = Vocabulary.SPLIT
    band: float = 0.0

    def vocab_rows(self, vocabulary: int, tp: int) -> int:
        """Rows of the embedding table over all ranks: padded to ``vocab_multiple * tp``."""
        step = self.vocab_multiple * tp if tp > 1 or self.pads_without_tp else 1
        return -(-vocabulary // step) * step

    def embedding_parts(self, tp: int) -> int:
        """Into how many parts ranks cut the embedding's weights, and with them the logits and the loss."""
        return tp if self.vocabulary is Vocabulary.SPLIT else 1

    def output_parts(self, tp: int) -> int:
        """Into how many parts ranks cut the output layer's weights."""
        return 1 if self.vocabulary is Vocabulary.WHOLE else tp


# Generations whose NVSwitches multicast, which TransformerEngine's user buffers use.
_MULTICAST = ("hopper", "blackwell")
# Bytes/s of a device to its domain that only NVSwitches reach; PCI Express 5 has 64e9, pairs of bridges up to 300e9.
_SWITCHED = 400e9


def default_runtime(capabilities: Capabilities, model: Model, cluster: Cluster) -> Runtime:
    """What plans for a target are launched with: mostly what its current release does by default."""
    if capabilities.target is Target.DEEPSPEED:
        return transformers_runtime(model)
    return Runtime(overlap_tensor=overlaps_tensor(model, cluster))


def transformers_runtime(model: Model) -> Runtime:
    """How a model of ``transformers`` runs under DeepSpeed."""
    return replace(
        TRANSFORMERS,
        gradient_bucket=gradient_bucket(model),
        column_layers=column_layers(model),
        vocabulary=vocabulary(model),
    )


# Elements of DeepSpeed's gradient buckets. Collectives below some 100 MB do not reach the bandwidth of the network
# [Empirical]; its own 5e8 holds gigabytes in buffers without being faster (runtime/zero/config.py, reduce_bucket_size).
_SMALLEST_BUCKET = 50_000_000
_LARGEST_BUCKET = 500_000_000


def gradient_bucket(model: Model) -> int:
    """Elements of a gradient bucket of plans for DeepSpeed."""
    return min(max(model.hidden_size**2, _SMALLEST_BUCKET), _LARGEST_BUCKET)


def overlaps_tensor(model: Model, cluster: Cluster, tp: int = 1) -> bool:
    """Whether Megatron plans overlap tensor-parallel communication: dense models do inside a node, where the hardware
    can."""
    switched = cluster.device.generation in _MULTICAST and cluster.intra.bandwidth >= _SWITCHED
    return switched and model.moe is None and tp <= cluster.devices_per_node


# Megatron-LM before 2023: separate kernels, fp16, no FlashAttention. The loss in PyTorch makes several fp32 copies of
# the logits. [Empirical], fitted on SC'21 (arXiv 2104.04473 table 1) and arXiv 2205.05198 table 5.
MEGATRON_2021 = Runtime(
    fused_kernels=False,
    transformer_engine=False,
    launch_s=_MEGATRON_2021_LAUNCH,
    softmax_length=_MEGATRON_2021_SOFTMAX,
    gradient_fusion=False,
    scatters_borders=True,
    loss=Loss(held=6.0, moved=118.0),
    kernel_s=1.17e-5,
)

# Modules of plain PyTorch around FlashAttention 2. [Empirical], as what follows.
_PYTORCH = Runtime(
    fused_kernels=False,
    transformer_engine=False,
    gradient_fusion=False,
    eager=True,
    previous_attention=True,
    softmax_length=0,
    kernel_s=7.0e-6,
    launch_s=_PYTORCH_LAUNCH,
)

# With FSDP: FlashAttention 1 too, a loss in fp32; checkpointing stops before the block's last projection, whose output
# backward does not need. [Empirical], set by hand on the A100 tables of LLM Foundry (mosaicml/llm-foundry,
# scripts/train/benchmarking/README.md).
PYTORCH_FSDP = replace(
    _PYTORCH,
    flash_share=0.6,
    recompute_share=0.7,
    loss=Loss(held=10.0, moved=60.0),
    cast_traffic=2.5,
)

# transformers' models under DeepSpeed; their attention is PyTorch's scaled_dot_product_attention. Launches and fetches
# [Empirical]: Qwen's fine-tuning of 1.8B on one A100 under ZeRO-3, as long with 256 tokens as with 2,048, and with LoRA
# without DeepSpeed (QwenLM/Qwen, README); DeepSpeed 0.19.8 on one CPU: 22 us a kernel of a Llama layer, 0.26 ms a
# module each way. The band holds 14 of 17 runs on A100 and A800 (docs/explanation/accuracy.md).
TRANSFORMERS = replace(
    _PYTORCH,
    launch_s=_TRANSFORMERS_LAUNCH,
    loss=TRANSFORMERS_LOSS,
    vocab_multiple=1,
    reused_parameters=1_000_000_000,
    fetch_launches=10.0,
    band=0.35,
)

# Layers of Megatron-LM before 2023 under Megatron-DeepSpeed: ranks that drift apart between collectives, a vocabulary
# that is padded only for tensor parallelism. [Empirical], fitted on 740 steps on one A100 node, which their source put
# together from 32 traced layers (docs/explanation/accuracy.md), and a fifth as much on 109 runs of 3.6B to 175B on 64
# to 512 A100 (VIA-Research/vTrain, data/ground_truth_multi.csv).
MEGATRON_DEEPSPEED_2023 = replace(
    MEGATRON_2021,
    rank_wait_s=1.55e-4,
    pads_without_tp=False,
)

# NeMo before Megatron-Bridge: FlashAttention 2; inputs and gradients of linear layers are quantized and transposed by
# kernels of their own, after norms and activations have written them in 16 bits. [Empirical], fitted on its H100 runs;
# its runs on Blackwell agree.
NEMO_2024 = Runtime(loss=FUSED_LOSS, narrow_parameters=True, cast_traffic=2.0, previous_attention=True)
