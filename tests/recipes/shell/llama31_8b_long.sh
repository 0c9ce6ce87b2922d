#!/bin/bash
# Long sequences with context parallelism.

case "${SIZE:-8b}" in
  8b)
    LAYERS=32; HIDDEN=4096; FFN=14336; HEADS=32
    ;;
  70b)
    LAYERS=80; HIDDEN=8192; FFN=28672; HEADS=64
    ;;
  *)
    echo "unknown size" >&2
    exit 1
    ;;
esac

SEQ_LENGTH=$((64 * 1024))
CP=8

OPTIONS=(
  --num-layers $LAYERS
  --hidden-size $HIDDEN
  --ffn-hidden-size $FFN
  --num-attention-heads $HEADS
  --group-query-attention
  --num-query-groups 8
  --seq-length $SEQ_LENGTH
  --max-position-embeddings 131072
  --position-embedding-type rope
  --rotary-base 500000
  --use-rope-scaling
  --swiglu
  --normalization RMSNorm
  --norm-epsilon 1e-5
  --untie-embeddings-and-output-weights
  --disable-bias-linear
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --vocab-size 128256
  --micro-batch-size 1
  --global-batch-size 32
  --bf16
  --use-distributed-optimizer
  --overlap-grad-reduce
)
OPTIONS+=(--context-parallel-size $CP --cp-comm-type p2p)
OPTIONS+=(--tensor-model-parallel-size 2 --sequence-parallel)

[ -n "$WANDB_API_KEY" ] && OPTIONS+=(--wandb-project long)

CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nproc_per_node 8 --nnodes 4 \
  pretrain_gpt.py "${OPTIONS[@]}" 2>&1 | tee train.log
