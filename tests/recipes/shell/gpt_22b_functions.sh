#!/bin/bash
# Arguments are gathered by functions.
set -e

export CUDA_DEVICE_MAX_CONNECTIONS=1
ARGS=()

add_model() {
  local layers=$1 hidden=$2 heads=$3
  ARGS+=(--num-layers "$layers" --hidden-size "$hidden" --num-attention-heads "$heads")
  ARGS+=(--seq-length 2048 --max-position-embeddings 2048)
}

add_batch() {
  ARGS+=(--micro-batch-size "$1")
  ARGS+=(--global-batch-size "$2")
}

add_parallel() {
  ARGS+=(--tensor-model-parallel-size "${TP:-8}")
  ARGS+=(--pipeline-model-parallel-size "${PP:-1}")
  if [ "${TP:-8}" -gt 1 ]; then
    ARGS+=(--sequence-parallel)
  fi
  ARGS+=(--recompute-activations)
}

add_model 48 6144 64
add_batch 4 64
add_parallel

for switch in bf16 use-distributed-optimizer; do
  ARGS+=("--$switch")
done

exec torchrun --nproc-per-node=8 --nnodes=4 pretrain_gpt.py "${ARGS[@]}" --lr 1e-4 --train-iters 1000
