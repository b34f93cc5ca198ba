#!/bin/bash
# configs/sd35m/unfinished.sh configs/sd35m/edit.yaml: prints --resume where the config has a version that has a checkpoint
# and no summary yet, which is what fit --resume goes on with; nothing where there is none.
set -euo pipefail
name=${1##*configs/}; name=${name%.yaml}
shopt -s nullglob
for version in "runs/$name"/version_*; do
    saved=("$version"/checkpoints/*.ckpt)
    if [ ${#saved[@]} -gt 0 ] && [ ! -e "$version/summary.json" ]; then
        echo --resume
        break
    fi
done
