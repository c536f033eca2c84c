// Schemas of the compiled operators, and the record of what this library was built from.
//
// The Python package owns the namespace `rpe_ops`; the kernels live in `rpe_ops_cpp` and are
// registered for CPU in gather.cpp and for CUDA in gather_cuda.cu.

#include <torch/library.h>

#include "rpe_ops_build.h"  // written by setup.py

// library.py reads this from the file before loading it, so that a library of another torch or of
// other sources is refused with a reason instead of a crash.
extern "C" C10_EXPORT const char rpe_ops_build_record[] =
    "rpe_ops build record: " RPE_OPS_BUILD_RECORD;

TORCH_LIBRARY_FRAGMENT(rpe_ops_cpp, library) {
  library.def("gather(Tensor lookup, Tensor index) -> Tensor");
  library.def("bucket_sum(Tensor pairs, Tensor index, int num_buckets) -> Tensor");
}
