"""Export trained models: `python -m scripts.export`.

`models` builds the model of a checkpoint, `program` writes it in standard operators.
"""
