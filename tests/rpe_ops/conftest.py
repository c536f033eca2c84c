"""The Triton kernels of these tests run in a fixed interpreter where there is no GPU."""

import tests.rpe_ops.interpreter  # noqa: F401  (fixes the interpreter)
