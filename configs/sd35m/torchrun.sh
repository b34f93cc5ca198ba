#!/bin/bash
# On one machine:      configs/sd35m/torchrun.sh configs/sd35m/edit.yaml
# On each of several:  NODES=8 HEAD=10.0.0.1 configs/sd35m/torchrun.sh configs/sd35m/edit.yaml --trainer.accumulate_grad_batches 1
set -euo pipefail
config=$1; shift
nodes=${NODES:-1} gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
exec torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id unipic \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
    -m lightning_modules.cli fit -c "$config" --trainer.num_nodes "$nodes" --trainer.devices "$gpus" "$@"
