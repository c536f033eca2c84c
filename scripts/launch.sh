#!/usr/bin/env bash
# Start a trainer on one or several nodes.
#   bash scripts/launch.sh MODULE CONFIG [FLAGS…]
# GPUS is the number of processes on this node (default: one per GPU, or 1). For several nodes, run
# the same command on each with NODES, NODE_RANK (0 to NODES - 1) and MASTER_ADDR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { sed -n '2,5s/^# \{0,1\}//p' scripts/launch.sh; exit 2; }

# `|| true`: without GPUs or the command, the count is 0 and no error.
gpus=${GPUS:-$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true)}
[ "$gpus" -gt 0 ] || gpus=1
launch=(--nproc_per_node="$gpus")
if [ "${NODES:-1}" -gt 1 ]; then
    launch+=(--nnodes="$NODES" --node_rank="${NODE_RANK:?NODE_RANK must be set}"
        --master_addr="${MASTER_ADDR:?MASTER_ADDR must be set}"
        --master_port="${MASTER_PORT:-29500}")
else
    launch+=(--standalone)
fi
module=$1
config=$2
shift 2
exec torchrun "${launch[@]}" -m "$module" --config "$config" "$@"
