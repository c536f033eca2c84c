#!/usr/bin/env bash
# Train a classification model on one or several nodes.
#   bash scripts/train_classification.sh CONFIG [FLAGS…]
#   GPUS=8 bash scripts/train_classification.sh \
#       configs/classification/deit_small_patch16_224_ctx_product_50_shared_k.yaml \
#       --data-path ./ImageNet/ --output_dir ./outputs/ --load-tar
# Several nodes: the same command on each, with NODES, NODE_RANK (0 to NODES - 1) and MASTER_ADDR.
# Keep GPUS × NODES × --batch-size × --accumulate_steps at 1024 for the published recipe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }

gpus=${GPUS:-$(nvidia-smi -L 2> /dev/null | wc -l)}
[ "$gpus" -gt 0 ] || gpus=1
launch=(--nproc_per_node="$gpus")
if [ "${NODES:-1}" -gt 1 ]; then
    launch+=(--nnodes="$NODES" --node_rank="${NODE_RANK:?set NODE_RANK}"
        --master_addr="${MASTER_ADDR:?set MASTER_ADDR}" --master_port="${MASTER_PORT:-29500}")
else
    launch+=(--standalone)
fi
config=$1
shift
exec torchrun "${launch[@]}" -m classification.main --config "$config" "$@"
