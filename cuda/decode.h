// From XLA's buffers and attributes to what every pass's problem has in common.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "plan.h"
#include "problem.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace flash2 {

// The static facts of a call, by the names of jax_flash2/_kernels.py.
struct Attributes {
  std::string_view operands;  // names of the optional operands in their order, comma-separated
  float scale;                // a factor of the operand, where there is one
  float soft_cap;
  bool is_causal;
  int32_t window_left;
  int32_t window_right;
  int32_t chunk_size;
  int32_t family;  // of the kernels; 0: the fastest that serve the call
};

// XLA makes the device current before it calls us, but does not promise it.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t ordinal);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// Arrays come row-major, [batch or 1, length, heads, head_dim].
Strides strides(xla::ffi::AnyBuffer x);

// `problem`'s own sizes are known where these judge: an array of query's dtype, and float32 of
// shape [batch, heads_q, seq_q].
xla::ffi::Error check_array(const char* name, xla::ffi::AnyBuffer x, xla::ffi::AnyBuffer query,
                            int64_t batch);
xla::ffi::Error check_shape(const char* name, xla::ffi::AnyBuffer x, const Problem& problem,
                            bool of_query, int32_t head_dim);
xla::ffi::Error check_row_values(const char* name, xla::ffi::AnyBuffer x, const Problem& problem);

// Query, key, value and attributes, for results of `batch` entries.
xla::ffi::Error decode_problem(xla::ffi::AnyBuffer query, xla::ffi::AnyBuffer key,
                               xla::ffi::AnyBuffer value, int64_t batch,
                               const Attributes& attributes, Problem* problem);

// One optional operand by its name.
xla::ffi::Error set_side(std::string_view name, xla::ffi::AnyBuffer x, Problem* problem);

// All of them: set(name, buffer) for each, in order.
template <class Set>
xla::ffi::Error for_each_side(std::string_view names, xla::ffi::RemainingArgs sides, Set set);

// What a plan says against a problem, with the values.
xla::ffi::Error judge(PlanStatus status, xla::ffi::AnyBuffer query, xla::ffi::AnyBuffer key,
                      xla::ffi::AnyBuffer value, const Problem& problem, const Device& device);

// ---------------------------------------------------------------------------------------- details

template <class Set>
xla::ffi::Error for_each_side(std::string_view names, xla::ffi::RemainingArgs sides, Set set) {
  size_t count = 0;
  while (!names.empty()) {
    const size_t comma = names.find(',');
    const std::string_view name = names.substr(0, comma);
    names = comma == std::string_view::npos ? std::string_view() : names.substr(comma + 1);
    auto side = sides.get<xla::ffi::AnyBuffer>(count++);
    FLASH2_CHECK(side.has_value()) << "operand '" << name << "' is named but not given";
    FLASH2_RETURN_IF_ERROR(set(name, *side));
  }
  FLASH2_CHECK(count == sides.size())
      << count << " optional operands are named; got " << sides.size();
  return xla::ffi::Error::Success();
}

}  // namespace flash2
