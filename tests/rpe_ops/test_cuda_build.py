"""The CUDA kernels without a GPU: their results in an emulation on the CPU, and their build."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from tests.rpe_ops.extension import PACKAGE, build_library, skip_without_compiler


def cuda_home() -> Path:
    """Return the folder of the CUDA toolkit; skip the test if there is none."""
    # torch derives CUDA_HOME from the nvcc on the PATH, which may be a link, so it comes last.
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", cpp_extension.CUDA_HOME):
        if home and Path(home, "bin", "nvcc").exists():
            return Path(home)
    pytest.skip("nvcc is found neither under CUDA_HOME nor in /usr/local/cuda")


def test_the_kernels_are_right_with_a_thread_for_every_lane(tmp_path):
    skip_without_compiler()
    program = tmp_path / "emulation"
    folders = [f"-I{folder}" for folder in (PACKAGE / "csrc", *cpp_extension.include_paths())]
    source = Path(__file__).with_name("cuda_emulation.cpp")
    flags = ["-std=c++20", "-O1", "-pthread", *folders]
    subprocess.run(
        [cpp_extension.get_cxx_compiler(), *flags, str(source), "-o", str(program)], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_the_library_compiles_with_cuda_kernels_that_spill_no_registers(tmp_path):
    home = cuda_home()
    skip_without_compiler()
    output = build_library(
        tmp_path,
        FORCE_CUDA="1",
        CUDA_HOME=str(home),
        TORCH_CUDA_ARCH_LIST="9.0",
        NVCC_APPEND_FLAGS="-Xptxas -v",
    )
    # Four dtypes of values times two of bucket ids.
    for kernel in ("gather_kernel", "bucket_sum_kernel"):
        assert len(re.findall(rf"Compiling entry function '\w*{kernel}", output)) == 8
    assert set(re.findall(r"(\d+) bytes spill", output)) == {"0"}
    assert max(map(int, re.findall(r"Used (\d+) registers", output))) <= 64
    (path,) = tmp_path.glob("rpe_ops/_C*")
    code = (
        "import torch; from rpe_ops import library\n"
        "assert library.load_library() == '', library.load_library()\n"
        "assert library.has_cuda_kernels(), library.reason_without_cuda()\n"
        "for name in ('gather', 'bucket_sum'):\n"
        "    registered = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "    assert registered(f'rpe_ops_cpp::{name}', 'CUDA')\n"
        "print(library.library_path())"
    )
    # This path comes before an installed library.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-c", code]
    output = subprocess.check_output(run, cwd=PACKAGE.parent, env=environment, text=True)
    assert output.strip() == str(path)
