"""Properties of the training software that neither the model nor the hardware determines.

A plan assumes what its target's current release does by default; a record of somebody's run may say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniap_tune.strategy import Capabilities, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How the engine executes a step.

    Attributes:
        cuda_graphs: kernels are replayed from CUDA graphs, so launching them costs no CPU time.
        fused_kernels: norms, activations, dropout and residuals run as few fused kernels (TransformerEngine); without,
            as separate kernels of PyTorch or of its compiler (Megatron-LM before 2023).
        launch_factor: CPU time of a kernel launch relative to a current Megatron-core layer.
        loss_bytes: bytes a logit takes while the loss is computed (Megatron's native vocabulary-parallel
            cross-entropy: fp16 logits and their fp32 copy = 6; native fused: 10; TransformerEngine: 4).
        loss_traffic: bytes a logit moves through memory, forward and backward.
        vocab_multiple: the vocabulary is padded to a multiple of this times tp (Megatron: 128); 1: not padded.
        pads_without_tp: the vocabulary is padded at tp 1 too.
        optimizer_instances: copies of the sharded optimizer states among the data-parallel ranks (Megatron's
            ``--num-distributed-optimizer-instances``).
        deterministic: PyTorch's deterministic mode, for which cuBLAS needs workspaces of 32 MiB (:4096:8).
        gradient_fusion: weight gradients accumulate inside the GEMM; TransformerEngine then keeps a dummy gradient of
            every distinct weight, 2 bytes for each parameter of one layer.
        transformer_engine: layers are TransformerEngine's; else Megatron's local ones, whose unfused attention keeps
            one s x s buffer for its matrix products.
    """

    cuda_graphs: bool = False
    fused_kernels: bool = True
    launch_factor: float = 1.0
    loss_bytes: float = 6.0
    loss_traffic: float = 29.0
    vocab_multiple: int = 128
    pads_without_tp: bool = True
    optimizer_instances: int = 1
    deterministic: bool = False
    gradient_fusion: bool = True
    transformer_engine: bool = True


    def vocab_rows(self, vocabulary: int, tp: int) -> int:
        """Rows of the embedding table over all ranks: padded to ``vocab_multiple * tp``."""
        step = self.vocab_multiple * tp if tp > 1 or self.pads_without_tp else 1
        return -(-vocabulary // step) * step


def default_runtime(capabilities: Capabilities) -> Runtime:
    """What a target's current release does by default."""
    if capabilities.target is Target.DEEPSPEED:
        return Runtime(vocab_multiple=1)
    return Runtime()
