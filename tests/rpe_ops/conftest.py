"""Where there is no GPU, Triton kernels run in Triton's interpreter, mended where it is wrong."""

import os
from dataclasses import replace

import numpy as np


def mend_interpreter() -> None:
    """Give Triton's interpreter products of bfloat16, and a third of its cost."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    create_dot, patch = builder.create_dot, interpreter._patch_lang
    nested_patched = {tl}

    def widen(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        # The bits of bfloat16 are kept as uint16, and numpy would multiply those.
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view("f4"), tl.float32)

    def dot(self, a, b, *rest) -> interpreter.TensorHandle:
        return create_dot(self, widen(a), widen(b), *rest)

    def call_device_function(self, *args, **kwargs):
        # The original patches the language at every call. The kernel around it has done so with
        # `tl`, and what it does to `tl.core`, for Triton's own functions, is never undone.
        languages = {x for x in (tl, tl.core) if any(x is y for y in self.fn.__globals__.values())}
        if not languages <= nested_patched:
            patch(self.fn)
            nested_patched.update(languages)
        return self.rewrite()(*args, **kwargs)

    # Checks of every sum and product of integers, whose outcome nothing looks at.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    builder.create_dot = dot
    function.__call__ = call_device_function


if os.environ.get("TRITON_INTERPRET") == "1":
    mend_interpreter()
