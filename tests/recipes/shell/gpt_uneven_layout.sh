#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
torchrun --nproc_per_node=8 --nnodes=2 pretrain_gpt.py --num-layers 32 --hidden-size 5120 \
  --num-attention-heads 40 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 2 \
  --global-batch-size 128 --fp16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 \
  --pipeline-model-parallel-layout "Et*3|(t*4|)*6t*5L" --lr 1e-4 --train-iters 100
