#!/usr/bin/env bash
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

CHECKPOINT_DIR=${1:-"checkpoints/llama3_8b"}
PRECISION="fp8"
TP=2
PP=1

LAUNCHER=(--nproc-per-node 8 --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}")

MODEL=(
  --use-mcore-models
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
  --num-attention-heads 32 --group-query-attention --num-query-groups 8
  --seq-length 8192 --max-position-embeddings 8192
  --position-embedding-type rope --rotary-base 500000
  --swiglu --normalization RMSNorm
  --untie-embeddings-and-output-weights --disable-bias-linear
  --attention-dropout 0.0 --hidden-dropout 0.0
)

TRAIN=(
  --micro-batch-size 1
  --global-batch-size 128
  --train-samples 1000000
  --lr 3e-4 --min-lr 3e-5
  --bf16
  --cross-entropy-loss-fusion
)

PRECISION_ARGS=()
if [[ "$PRECISION" == "fp8" ]]; then
  PRECISION_ARGS+=(
    "--fp8-format hybrid"   # E4M3 forward, E5M2 backward
    "--fp8-amax-history-len 1024"
    "--fp8-amax-compute-algo max"
  )
fi

PARALLEL=(
  --tensor-model-parallel-size $TP
  --pipeline-model-parallel-size $PP
  --sequence-parallel
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
)

if [[ ! -d "$CHECKPOINT_DIR" ]]; then
  mkdir -p "$CHECKPOINT_DIR"
fi

torchrun "${LAUNCHER[@]}" pretrain_gpt.py \
  "${MODEL[@]}" \
  "${TRAIN[@]}" \
  ${PRECISION_ARGS[@]} \
  "${PARALLEL[@]}" \
  --mock-data --tokenizer-type NullTokenizer --vocab-size 128256 \
  "$@"
