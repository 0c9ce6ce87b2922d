#!/usr/bin/env bash
# Written by uniap-tune VERSION, inputs 0123456789abcdef.
# gpt2 on 1x4:l4
#
# Run it on one node; arguments given to this script are passed on to yours.
#   TRAIN_SCRIPT    your training script
#   SCRIPT_STYLE    deepspeed: it takes --deepspeed --deepspeed_config FILE (default)
#                   trainer: it parses transformers' TrainingArguments
#   HOSTFILE        DeepSpeed's hostfile, for more than one node (default /job/hostfile)
#
# Note: layers are counted as transformers writes them, operator by operator around fused attention; compiled, or with fused kernels, they take less time and memory.
#
# This is a pipeline: TRAIN_SCRIPT must build a deepspeed.pipe.PipelineModule and cut it as pipeline_split.json says,
# for which DeepSpeed's JSON has no key. Its layers are the embedding, each transformer block, and the head;
# uniap_tune.deepspeed.pipeline_module(layers) builds it.
# The head shares the embedding's matrix: make both a TiedLayerSpec.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
: "${TRAIN_SCRIPT:?set TRAIN_SCRIPT to your training script}"

export PYTHON_UNIAP_TUNE_PLAN="$here/pipeline_split.json" # DeepSpeed passes variables named PYTHON* on to other nodes
LAUNCHER_ARGS=(--num_gpus "${NUM_GPUS:-4}")
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
    )
    ;;
  *)
    echo "SCRIPT_STYLE is '$SCRIPT_STYLE', not deepspeed or trainer" >&2
    exit 2
    ;;
esac

exec deepspeed "${LAUNCHER_ARGS[@]}" "$TRAIN_SCRIPT" "${SCRIPT_ARGS[@]}" "$@"
