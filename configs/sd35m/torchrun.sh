#!/bin/bash
# On one machine:      configs/sd35m/torchrun.sh configs/sd35m/edit.yaml
# On each of several:  NODES=8 HEAD=10.0.0.1 configs/sd35m/torchrun.sh configs/sd35m/edit.yaml, and what README.md changes
# RESUME=1 goes on from the newest checkpoint of an unfinished version, and starts anew where there is none. Anything that is
# wrong with the config, the weights or the data is listed before a GPU is touched.
set -euo pipefail
config=$1; shift
nodes=${NODES:-1} gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
sizes=(--trainer.num_nodes "$nodes" --trainer.devices "$gpus")
again=()
[ "${RESUME:-0}" -eq 0 ] || again=($(bash configs/sd35m/unfinished.sh "$config"))
[ ${#again[@]} -gt 0 ] || python -m lightning_modules.cli fit -c "$config" "$@" "${sizes[@]}" --dry_run
exec torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id unipic \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
    -m lightning_modules.cli fit -c "$config" "$@" "${sizes[@]}" "${again[@]}"
