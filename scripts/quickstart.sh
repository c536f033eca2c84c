#!/usr/bin/env bash
# From a bare machine to trained, killed, resumed and evaluated models, on the embedded data.
# Two CPU cores are enough; after installation this takes some minutes.
#   bash scripts/quickstart.sh [OUTPUT_DIR]        default outputs/quickstart, begun anew
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

out=${1:-outputs/quickstart}
rm -rf "$out"
mkdir -p "$out"
# Two runs side by side, one thread each: faster on two cores than one run with two threads.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

train() { # name, flags…
    local name=$1
    shift
    python -m classification.main --config configs/classification/digits.yaml \
        --output_dir "$out/$name" --print_freq 1000 "$@" > "$out/$name.txt" 2>&1
}

killed_and_resumed() {
    echo "absolute + iRPE: training, to be killed (SIGKILL) in mid-epoch"
    python -m classification.main --config configs/classification/digits.yaml \
        --output_dir "$out/absolute_irpe" --print_freq 1 --checkpoint_steps 5 \
        > "$out/absolute_irpe_killed.txt" 2>&1 &
    local pid=$!
    until [ "$(cat "$out/absolute_irpe/log.txt" 2> /dev/null | wc -l)" -ge 3 ]; do
        kill -0 "$pid" 2> /dev/null || { cat "$out/absolute_irpe_killed.txt"; exit 1; }
        sleep 0.2
    done
    sleep 0.7
    kill -KILL "$pid"
    wait "$pid" 2> /dev/null || true
    echo "absolute + iRPE: killed after $(wc -l < "$out/absolute_irpe/log.txt") epochs; resuming"
    train absolute_irpe --auto_resume
}

python -m datasets.embedded data/digits
echo "Training four models, two at a time; progress is in $out/*.txt"
{
    train irpe --no-abs_pos_embed
    train neither --no-abs_pos_embed --rpe ""
} &
others=$!
killed_and_resumed
train absolute --rpe ""
wait "$others"

echo "Evaluating the checkpoint of absolute + iRPE"
python -m classification.main --config configs/classification/digits.yaml --eval \
    --resume "$out/absolute_irpe/checkpoint.pth" --output_dir "$out/evaluation" \
    | tee "$out/evaluation.txt"
python -m scripts.quickstart_report "$out"
