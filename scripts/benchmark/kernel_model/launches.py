"""Record the launches of Triton kernels, and compile them without a GPU.

Launches are recorded in `JITFunction.run`, through which every launch goes, so no kernel is looked
up by its name.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

__all__ = [
    "Launch",
    "Work",
    "compile_launch",
    "name_launches",
    "pretend_capability",
    "record_launches",
    "tensor_bytes",
]

# Arguments of a launch that are options of the compiler and not parameters of the kernel.
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


class Launch(NamedTuple):
    """A kernel, its grid of programs and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        """Number of programs."""
        count = 1
        for size in self.grid:
            count *= size
        return count

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that are constants of the compiled kernel."""
        names = [parameter.name for parameter in self.kernel.params if parameter.is_constexpr]
        return {name: self.arguments[name] for name in names}

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return self.arguments.get("num_warps", 4)


@contextmanager
def pretend_capability(architecture: int) -> Iterator[None]:
    """Answer every question for the compute capability of a GPU with `architecture`."""
    capability = (architecture // 10, architecture % 10)
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        yield


class Work(NamedTuple):
    """Work of torch's operators: bytes that they read and write, and multiplications."""

    operators: int
    bytes: int
    macs: int


class _CountWork(TorchDispatchMode):
    """Count the work of torch's operators. Views and new memory are no work."""

    def __init__(self) -> None:
        """Begin without any work."""
        super().__init__()
        self.work = Work(0, 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count it."""
        out = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.__name__ or not isinstance(out, Tensor):
            return out
        inputs = [x for x in args if isinstance(x, Tensor)]
        macs = out.numel() * inputs[-1].shape[-2] if "mm" in func.__name__ else 0
        operators, moved, done = self.work
        moved += sum(map(tensor_bytes, [*inputs, out]))
        self.work = Work(operators + 1, moved, done + macs)
        return out


def tensor_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor; a dimension that is expanded counts once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def record_launches(step: Callable[[], None]) -> tuple[list[Launch], Work]:
    """Return the launches of a step on meta tensors, in order, and the work of torch."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        for parameter in kernel.params:
            if parameter.name not in arguments and parameter.has_default:
                arguments[parameter.name] = parameter.default
        sizes = grid(arguments) if callable(grid) else grid
        found.append(Launch(kernel, tuple(map(int, sizes)), arguments))

    counter = _CountWork()
    with mock.patch.object(JITFunction, "run", record), counter:
        step()
    return found, counter.work


def name_launches(launches: list[Launch]) -> list[str]:
    """Return the kernel of each launch, with a constant that differs between its launches."""
    names = []
    for launch in launches:
        kernel = launch.kernel.fn.__name__
        same = [other.constants for other in launches if other.kernel is launch.kernel]
        differ = {
            key: x for key, x in launch.constants.items() if any(other[key] != x for other in same)
        }
        name = kernel.strip("_").removesuffix("_kernel")
        if differ:
            name += " " + ", ".join(f"{key}={x}" for key, x in list(differ.items())[:1])
        names.append(name)
    return names


def compile_launch(launch: Launch, architecture: int) -> Any:
    """Compile a launch for `sm_{architecture}`."""
    arguments = dict(launch.arguments)
    options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if parameter.do_not_specialize:
            continue
        # As at a launch: an integer of 1 is a constant, and alignment to 16 bytes is used.
        if isinstance(value, Tensor):
            whole, value = True, value.storage_offset() * value.element_size()
        if whole and value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        elif whole and value % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    assert not arguments, f"unknown arguments of the kernel: {', '.join(arguments)}"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    # Triton's cache holds the same kernel of another checkout, with paths of that one.
    with mock.patch.dict(os.environ, {"TRITON_ALWAYS_COMPILE": "1"}):
        return triton.compile(source, target=target, options=options)
