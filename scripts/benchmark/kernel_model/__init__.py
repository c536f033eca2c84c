"""Model of the compiled Triton attention kernels, for `python -m scripts.benchmark static`.

`recipes` holds the attention layers, `launches` records and compiles their kernels, `trip_counts`
counts how often the loops of the source run, `sass` reads the machine code, `weights` counts how
often its blocks run, `opcodes` and `gpus` hold the properties of instructions and GPUs, `latency`
follows one warp, and `bounds` combines all of them.
"""
