#!/usr/bin/env bash
# Train a detection model on one or several nodes; launch.sh says how to name them.
#   GPUS=8 bash scripts/train_detection.sh \
#       configs/detection/rpe-2.0-product-ctx-1-k_150_epochs.yaml \
#       --coco_path ./coco_data --output_dir ./output
# Keep GPUS × NODES × --batch-size × --accumulate_steps at 16 for the published recipe.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" detection.main "$@"
