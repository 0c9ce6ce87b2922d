#!/bin/bash
# The model's sizes come from a file beside this one.
SCRIPT_DIR="$( cd "$( dirname "${BASH_SOURCE[0]}" )" && pwd )"
source "${SCRIPT_DIR}/common_env.sh"

NNODES=8
VOCAB=32000

PARALLEL="--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 \
  --num-virtual-stages-per-pipeline-rank 5 --sequence-parallel --use-distributed-optimizer"

CMD="torchrun --nproc_per_node 8 --nnodes ${NNODES} pretrain_gpt.py \
  ${LLAMA2_70B} --seq-length ${SEQ} --max-position-embeddings ${SEQ} \
  --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope \
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \
  --micro-batch-size 1 --global-batch-size 128 --bf16 --vocab-size $VOCAB \
  ${PARALLEL} --lr 1.5e-4 --train-iters 1000"

echo "$CMD"
eval "$CMD"
