#!/usr/bin/env bash
# Train a classifier on one or several nodes, which launch.sh describes.
#   GPUS=8 bash scripts/train_classification.sh \
#       configs/classification/deit_small_patch16_224_ctx_product_50_shared_k.yaml \
#       --data-path ./ImageNet/ --output_dir ./outputs/ --load-tar
# The published recipe has a total batch size (GPUS × NODES × --batch-size × --accumulate_steps) of
# 1024.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" classification.main "$@"
