"""Pictures of the iRPE in a trained model: `python -m scripts.inspect`.

`source` builds the model of a checkpoint, `layers` reads tables and attention weights from it, and
`buckets`, `tables` and `attention` draw them. matplotlib is imported only where pictures are drawn.
"""
