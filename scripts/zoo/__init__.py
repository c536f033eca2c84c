"""The model zoo as a command: its tables, its checkpoints, its figures measured anew.

The rows are those of `configs/zoo.yaml`; `python -m scripts.zoo --help` lists what can be done.
"""
