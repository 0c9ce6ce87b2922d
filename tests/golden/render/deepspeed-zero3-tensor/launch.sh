#!/usr/bin/env bash
# Written by uniap-tune VERSION, inputs 0123456789abcdef.
# llama-3-8b on 2x8:a100-80gb-sxm
#
# Run it on one node; arguments given to this script are passed on to yours.
#   TRAIN_SCRIPT    your training script
#   SCRIPT_STYLE    deepspeed: it takes --deepspeed --deepspeed_config FILE (default)
#                   trainer: it parses transformers' TrainingArguments
#   HOSTFILE        DeepSpeed's hostfile, for more than one node (default /job/hostfile)
#
# Note: layers are counted as transformers writes them, operator by operator around fused attention; compiled, or with fused kernels, they take less time and memory.
#
# Build the model under deepspeed.zero.Init, or every rank first builds it whole; transformers does so by itself where
# its TrainingArguments exist before the model.
#
# The plan recomputes activations, which DeepSpeed's JSON cannot switch on. SCRIPT_STYLE=trainer does it by
# --gradient_checkpointing; another script must call model.gradient_checkpointing_enable() or the like.
#
# The 2 ranks of a tensor-parallel group must read the same samples.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
: "${TRAIN_SCRIPT:?set TRAIN_SCRIPT to your training script}"

LAUNCHER_ARGS=(--num_gpus "${NUM_GPUS:-8}")
LAUNCHER_ARGS+=(--num_nodes "${NUM_NODES:-2}" --hostfile "${HOSTFILE:-/job/hostfile}")
if [[ -n "${MASTER_ADDR:-}" ]]; then
  LAUNCHER_ARGS+=(--master_addr "$MASTER_ADDR")
fi
LAUNCHER_ARGS+=(--master_port "${MASTER_PORT:-29500}")

case "${SCRIPT_STYLE:-deepspeed}" in
  deepspeed)
    SCRIPT_ARGS=(--deepspeed --deepspeed_config "$here/ds_config.json")
    ;;
  trainer)
    SCRIPT_ARGS=(
      --deepspeed "$here/ds_config.json"
      --per_device_train_batch_size=1
      --gradient_accumulation_steps=8
      --max_grad_norm=1.0
      --bf16
      --gradient_checkpointing
    )
    ;;
  *)
    echo "SCRIPT_STYLE is '$SCRIPT_STYLE', not deepspeed or trainer" >&2
    exit 2
    ;;
esac

exec deepspeed "${LAUNCHER_ARGS[@]}" "$TRAIN_SCRIPT" "${SCRIPT_ARGS[@]}" "$@"
