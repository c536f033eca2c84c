#!/usr/bin/env bash
# Train a classification model on one or several nodes; launch.sh says how to name them.
#   GPUS=8 bash scripts/train_classification.sh \
#       configs/classification/deit_small_patch16_224_ctx_product_50_shared_k.yaml \
#       --data-path ./ImageNet/ --output_dir ./outputs/ --load-tar
# Keep GPUS × NODES × --batch-size × --accumulate_steps at 1024 for the published recipe.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" classification.main "$@"
