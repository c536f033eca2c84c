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

run() { # trainer, name of the run, flags…
    python -m "$1.main" --config "configs/$1/digits.yaml" --output_dir "$out/$2" "${@:3}" \
        >> "$out/$2.txt" 2>&1 || { cat "$out/$2.txt" && exit 1; }
}

run_interrupted() { # signal, trainer, name of the run, flags…
    local log=$out/$3/log.txt
    # A command of its own, so that the process that gets the signal is the trainer itself.
    python -m "$2.main" --config "configs/$2/digits.yaml" --output_dir "$out/$3" \
        --checkpoint_steps 20 "${@:4}" > "$out/$3.txt" 2>&1 &
    local trainer=$!
    until [ "$(cat "$log" 2> /dev/null | wc -l)" -ge 2 ]; do
        kill -0 "$trainer" 2> /dev/null || { cat "$out/$3.txt" && exit 1; }
        sleep 0.2
    done
    sleep 1
    kill "-$1" "$trainer"
    wait "$trainer" 2> /dev/null || true
    echo "$3: ended by SIG$1 in epoch $(cat "$log" | wc -l); resuming"
    run "${@:2}" --auto_resume
}

python -m datasets.embedded data/digits
echo "Training four classifiers and a detector, two at a time; progress is in $out/*.txt"
run_interrupted TERM detection detection --print_freq 25 &
other=$!
run_interrupted KILL classification absolute_irpe
run classification irpe --no-abs_pos_embed
run classification absolute --rpe ""
run classification neither --no-abs_pos_embed --rpe ""
wait "$other"

echo "Evaluating checkpoints"
run classification evaluation --eval --resume "$out/absolute_irpe/checkpoint.pth" &
other=$!
run detection detection_evaluation --eval --resume "$out/detection/checkpoint.pth"
wait "$other"
python -m scripts.quickstart.classification "$out"
python -m scripts.quickstart.detection "$out"
