# Sourced by recipes of this folder.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=WARN
SEQ=4096
LLAMA2_70B="--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 \
  --group-query-attention --num-query-groups 8"
