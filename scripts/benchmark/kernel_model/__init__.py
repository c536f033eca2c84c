"""Model of the compiled Triton attention kernels, for `python -m scripts.benchmark static`.

`recipes` lists the attention layers, `launches` records and compiles their kernels, `trip_counts`
counts how often the loops of the kernels run, `sass` reads the disassembly and its loops, `gpus`
holds the GPUs, and `bounds` combines all of them.
"""
