#!/usr/bin/env bash
# Written by uniap-tune VERSION, inputs 0123456789abcdef.
# llama-3-70b on 8x8:h100-sxm
#
# Run it on every node; arguments given to this script come last, so they win. It runs as it is, on made-up data.
#   MEGATRON_PATH                     checkout of Megatron-LM 0.19 (default ./Megatron-LM)
#   NNODES NODE_RANK MASTER_ADDR      which of how many nodes this is, and where the first one is
#   DATA_PATH                         prefix of an indexed dataset, or a blend of weights and prefixes
#   TOKENIZER_MODEL TOKENIZER_TYPE    the tokenizer of DATA_PATH (default type HuggingFaceTokenizer)
#   CHECKPOINT_DIR                    load from and save to; nothing is saved without it
set -euo pipefail

MEGATRON_PATH="${MEGATRON_PATH:-Megatron-LM}"
if [[ ! -f "$MEGATRON_PATH/pretrain_gpt.py" ]]; then
  echo "$MEGATRON_PATH/pretrain_gpt.py is not there: set MEGATRON_PATH to a checkout of Megatron-LM" >&2
  exit 2
fi
export PYTHONPATH="$MEGATRON_PATH${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=1

NNODES="${NNODES:-8}"
: "${MASTER_ADDR:?set MASTER_ADDR to the host name of the first node}"
DISTRIBUTED_ARGS=(
  --nproc-per-node "${NPROC_PER_NODE:-8}"
  --nnodes "$NNODES"
  --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}"
  --master-addr "${MASTER_ADDR:-localhost}"
  --master-port "${MASTER_PORT:-29500}"
)

MODEL_ARGS=(
  --num-layers 80
  --hidden-size 8192
  --ffn-hidden-size 28672
  --num-attention-heads 64
  --seq-length 8192
  --max-position-embeddings 8192
  --padded-vocab-size 129024
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --untie-embeddings-and-output-weights
  --normalization RMSNorm
  --norm-epsilon 1e-05
  --disable-bias-linear
  --group-query-attention
  --num-query-groups 8
  --position-embedding-type rope
  --rotary-base 500000
  --swiglu
)

PARALLEL_ARGS=(
  --tensor-model-parallel-size 8
  --sequence-parallel
  --tp-comm-overlap
  --pipeline-model-parallel-size 4
  --pipeline-model-parallel-layout 'Et*18|t*20|t*21|t*21L'
)

BATCH_ARGS=(
  --micro-batch-size 1
  --global-batch-size 128
)

SHARDING_ARGS=(
  --overlap-grad-reduce
  --use-distributed-optimizer
  --overlap-param-gather
)

PRECISION_ARGS=(
  --bf16
)

KERNELS_ARGS=(
  --attention-backend auto
  --no-create-attention-mask-in-dataloader
)

OPTIMIZER_ARGS=(
  --optimizer adam
  --adam-beta1 "${ADAM_BETA1:-0.9}"
  --adam-beta2 "${ADAM_BETA2:-0.95}"
)

TRAINING_ARGS=(
  --train-iters "${TRAIN_ITERS:-50}"
  --lr "${LR:-0.0003}"
  --min-lr "${MIN_LR:-3e-05}"
  --lr-decay-style "${LR_DECAY_STYLE:-cosine}"
  --lr-warmup-iters "${LR_WARMUP_ITERS:-0}"
  --weight-decay "${WEIGHT_DECAY:-0.1}"
  --clip-grad "${CLIP_GRAD:-1.0}"
  --init-method-std "${INIT_METHOD_STD:-0.02}"
  --eval-iters "${EVAL_ITERS:-0}"
  --eval-interval "${EVAL_INTERVAL:-1000}"
  --log-interval "${LOG_INTERVAL:-1}"
  --log-throughput
)

DATA_ARGS=()
if [[ -n "${DATA_PATH:-}" ]]; then
  read -r -a data_path <<<"$DATA_PATH"
  DATA_ARGS+=(--data-path "${data_path[@]}" --split "${SPLIT:-99,1,0}")
else
  DATA_ARGS+=(--mock-data)
fi
if [[ -n "${TOKENIZER_MODEL:-}" ]]; then
  DATA_ARGS+=(--tokenizer-type "${TOKENIZER_TYPE:-HuggingFaceTokenizer}" --tokenizer-model "$TOKENIZER_MODEL")
else
  DATA_ARGS+=(--tokenizer-type NullTokenizer --vocab-size 128256)
fi
if [[ -n "${CHECKPOINT_DIR:-}" ]]; then
  DATA_ARGS+=(--load "$CHECKPOINT_DIR" --save "$CHECKPOINT_DIR" --save-interval "${SAVE_INTERVAL:-1000}")
fi

exec torchrun "${DISTRIBUTED_ARGS[@]}" "$MEGATRON_PATH/pretrain_gpt.py" \
  "${MODEL_ARGS[@]}" \
  "${PARALLEL_ARGS[@]}" \
  "${BATCH_ARGS[@]}" \
  "${SHARDING_ARGS[@]}" \
  "${PRECISION_ARGS[@]}" \
  "${KERNELS_ARGS[@]}" \
  "${OPTIMIZER_ARGS[@]}" \
  "${TRAINING_ARGS[@]}" \
  "${DATA_ARGS[@]}" \
  "$@"
