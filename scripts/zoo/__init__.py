"""Model zoo: the published models, their metrics and their checkpoints.

The rows are in `configs/zoo.yaml`. `python -m scripts.zoo --help` lists the commands.
"""
