// jax_flash2._cuda: the handlers as capsules, and what the module was built from.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "handlers.h"
#include "plan.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace {

nb::dict registrations() {
  nb::dict targets;
  for (const flash2::Registration& r : flash2::kRegistrations) {
    targets[r.target] = nb::capsule(reinterpret_cast<void*>(r.handler));
  }
  return targets;
}

nb::dict build_info() {
  nb::dict info;
  info["compiler"] = "nvcc " JAX_FLASH2_NVCC_VERSION;
  info["host_compiler"] = __VERSION__;
  info["cuda"] = nb::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  info["architectures"] = JAX_FLASH2_ARCHITECTURES;
  info["ffi"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  return info;
}

// The newest CUDA that the installed driver serves, as (major, minor); (0, 0) without a driver.
nb::tuple driver_cuda() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
  return nb::make_tuple(version / 1000, version % 1000 / 10);
}

int64_t backward_workspace_bytes(int64_t batch, int64_t heads_q, int64_t seq_q, int64_t head_dim,
                                 int64_t seq_kv, bool segments) {
  return flash2::backward_workspace(batch, heads_q, seq_q, head_dim, seq_kv, segments).bytes;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.def("registrations", &registrations, "FFI targets by name, as capsules.");
  m.def("build_info", &build_info, "Compiler, CUDA, architectures, and FFI version.");
  m.def("forward_workspace_bytes", &flash2::forward_workspace_bytes,
        "What the forward wants as its workspace at most, on any GPU.");
  m.def("backward_workspace_bytes", &backward_workspace_bytes,
        "What the backward wants as its workspace, on any GPU.");
  m.def("driver_cuda", &driver_cuda, "The newest CUDA that the installed driver serves.");
}
