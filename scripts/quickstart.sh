#!/usr/bin/env bash
# Train, kill, resume and evaluate small models on data that needs no download.
#   bash scripts/quickstart.sh [OUTPUT_DIR]        default: outputs/quickstart
# Two CPU cores are enough. After the installation this takes some minutes. A relative OUTPUT_DIR is
# relative to the repository. Results of an earlier quickstart in OUTPUT_DIR are deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ${1:-} != -* ]] || { sed -n '2,5s/^# \{0,1\}//p' scripts/quickstart.sh; exit 2; }

out=${1:-outputs/quickstart}
# Only a folder with this file is emptied: the quickstart writes it when it creates the folder.
marker=.irpe-quickstart
if [ -e "$out" ] && [ ! -f "$out/$marker" ]; then
    if [ ! -d "$out" ] || [ -n "$(find "$out/" -mindepth 1 -print -quit)" ]; then
        echo "error: OUTPUT_DIR must be missing, empty or made by this script (with the file" \
            "$marker in it), got '$out': remove it yourself or name another folder" >&2
        exit 2
    fi
fi
mkdir -p "$out"
echo "Made by scripts/quickstart.sh, which empties this folder when it runs again." > "$out/$marker"

source scripts/install.sh
find "$out/" -mindepth 1 -maxdepth 1 ! -name "$marker" -exec rm -rf {} +
# On two cores, two runs of one thread each are faster than one run of two threads.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

run() { # TRAINER NAME [FLAGS…]
    python -m "$1.main" --config "configs/$1/digits.yaml" --output_dir "$out/$2" "${@:3}" \
        >> "$out/$2.txt" 2>&1 || { cat "$out/$2.txt" && exit 1; }
}

run_interrupted() { # SIGNAL TRAINER NAME [FLAGS…]
    local log=$out/$3/log.txt
    # Python is started directly and not by a function, so that $! is the process of the trainer.
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
    echo "$3: ended by SIG$1 in epoch $(wc -l < "$log"); resuming"
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

predict=(python -m detection.predict "$out/detection/best_checkpoint.pth"
    data/scenes/val2017.zip/val2017/000000008001.jpg --output_dir "$out/predicted")
"${predict[@]}" > "$out/predicted.txt" 2>&1 || { cat "$out/predicted.txt" && exit 1; }
printf '\nA predicted picture, %s, made by\n ' "$out/predicted/000000008001.jpg"
printf ' %q' "${predict[@]}"
printf '\n'

inspect=(python -m scripts.inspect "$out/irpe/checkpoint.pth" --image data/digits/val/5/0102.png)
printf '\nPictures of iRPE, made by\n '
printf ' %q' "${inspect[@]}"
printf '\n'
"${inspect[@]}" 2> "$out/inspect.txt" || { cat "$out/inspect.txt" && exit 1; }
