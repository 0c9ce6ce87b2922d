#!/bin/bash
#SBATCH --job-name=gpt-15b
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=04:00:00

# One string of options, as clusters with srun and containers have it.
export CUDA_DEVICE_MAX_CONNECTIONS=1

DIR=`pwd`
MEGATRON=${MEGATRON:-/opt/megatron-lm}

options=" \
    --tensor-model-parallel-size 8 \
    --pipeline-model-parallel-size 2 \
    --sequence-parallel \
    --num-layers 32 \
    --hidden-size 6144 \
    --num-attention-heads 48 \
    --group-query-attention \
    --num-query-groups 8 \
    --seq-length 4096 \
    --max-position-embeddings 4096 \
    --squared-relu \
    --apply-layernorm-1p \
    --disable-bias-linear \
    --untie-embeddings-and-output-weights \
    --position-embedding-type rope \
    --rotary-percent 0.5 \
    --hidden-dropout 0.0 \
    --attention-dropout 0.0 \
    --micro-batch-size 4 \
    --global-batch-size 256 \
    --tokenizer-type GPTSentencePieceTokenizer \
    --vocab-size 256000 \
    --recompute-granularity full \
    --recompute-method block \
    --recompute-num-layers 8 \
    --use-distributed-optimizer \
    --train-samples 200000 \
    --bf16"

run_cmd="cd ${MEGATRON}; python -u pretrain_gpt.py ${options}"

srun -l --container-image "$IMAGE" --output="${DIR}/%x_%j.log" sh -c "${run_cmd}"

set +x
