#!/usr/bin/env bash
# Train a detector on one or several nodes, which launch.sh describes.
#   GPUS=8 bash scripts/train_detection.sh \
#       configs/detection/rpe-2.0-product-ctx-1-k_150_epochs.yaml \
#       --coco_path ./coco_data --output_dir ./output
# The published recipe has a total batch size (GPUS × NODES × --batch-size × --accumulate_steps) of
# 16.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" detection.main "$@"
