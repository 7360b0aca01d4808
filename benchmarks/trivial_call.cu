// A custom call whose kernel does next to nothing: what benchmarks/gap.py compares ours with.
#include <cuda_runtime.h>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

__global__ void add_one(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + 1.0f; }

static ffi::Error trivial(cudaStream_t stream, ffi::Buffer<ffi::F32> x,
                          ffi::Result<ffi::Buffer<ffi::F32>> y) {
  add_one<<<1, 32, 0, stream>>>(x.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Trivial, trivial,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>(),
                              {ffi::Traits::kCmdBufferCompatible});
