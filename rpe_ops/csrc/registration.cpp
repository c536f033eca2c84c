// Schemas of gather and bucket sum, and the build record of the library.
//
// The namespace `rpe_ops` is defined in Python. The compiled operators are in `rpe_ops_cpp`: gather
// and bucket sum are registered for the CPU in gather.cpp and for CUDA in gather_cuda.cu.

#include <torch/library.h>

#include "rpe_ops_build.h"  // written by setup.py

// library.py reads this record from the file before loading it. A library that was built for
// another torch or from other sources is then reported and cannot crash.
extern "C" C10_EXPORT const char rpe_ops_build_record[] =
    "rpe_ops build record: " RPE_OPS_BUILD_RECORD;

TORCH_LIBRARY_FRAGMENT(rpe_ops_cpp, library) {
  library.def("gather(Tensor lookup, Tensor bucket_ids) -> Tensor");
  library.def("bucket_sum(Tensor pairs, Tensor bucket_ids, int num_buckets) -> Tensor");
}
