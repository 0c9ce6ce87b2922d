#!/bin/bash
# Megatron-FSDP; no single work queue.
unset CUDA_DEVICE_MAX_CONNECTIONS

while [ $# -gt 0 ]; do
  case "$1" in
    --mbs) MBS="$2"; shift 2 ;;
    *) echo "unknown $1"; exit 1 ;;
  esac
done
MBS=${MBS:-1}

DATA_ARGS='--mock-data --tokenizer-type NullTokenizer --vocab-size 151936'

MODEL_ARGS=(
  --num-layers 36
  --hidden-size 4096
  --ffn-hidden-size 12288
  --num-attention-heads 32
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
  --qk-layernorm
  --seq-length 4096
  --max-position-embeddings 40960
  --position-embedding-type rope
  --rotary-base 1000000
  --swiglu
  --normalization RMSNorm
  --norm-epsilon 1e-6
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
)

FSDP_ARGS=(
  --use-megatron-fsdp
  --data-parallel-sharding-strategy optim_grads_params
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
  --ckpt-format fsdp_dtensor
  --no-gradient-accumulation-fusion
)

COMMAND=(
  torchrun --nproc-per-node 8 --nnodes 1
  pretrain_gpt.py
  "${MODEL_ARGS[@]}"
  --micro-batch-size "$MBS" --global-batch-size 64
  --bf16
  "${FSDP_ARGS[@]}"
)
"${COMMAND[@]}" $DATA_ARGS
