#!/usr/bin/env bash
# Start a trainer on one or several nodes; train_classification.sh and train_detection.sh call it.
#   bash scripts/launch.sh MODULE CONFIG [FLAGS…]
# GPUS is the number of processes on this node (default: its GPUs, or 1). Several nodes: the same
# command on each, with NODES, NODE_RANK (0 to NODES - 1) and MASTER_ADDR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2; }

gpus=${GPUS:-$(nvidia-smi -L 2> /dev/null | wc -l)}
[ "$gpus" -gt 0 ] || gpus=1
launch=(--nproc_per_node="$gpus")
if [ "${NODES:-1}" -gt 1 ]; then
    launch+=(--nnodes="$NODES" --node_rank="${NODE_RANK:?set NODE_RANK}"
        --master_addr="${MASTER_ADDR:?set MASTER_ADDR}" --master_port="${MASTER_PORT:-29500}")
else
    launch+=(--standalone)
fi
module=$1
config=$2
shift 2
exec torchrun "${launch[@]}" -m "$module" --config "$config" "$@"
