// Errors as values, with the numbers in the text: FLASH2_CHECK(a == b) << "a must be b; got " <<
// a. For functions that return ffi::Error; nothing here throws.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>

#include "xla/ffi/api/ffi.h"

namespace flash2 {

class Failure {
 public:
  explicit Failure(xla::ffi::ErrorCode code) : code_(code) { text_ << "jax_flash2: "; }

  template <class T>
  Failure& operator<<(const T& part) {
    text_ << part;
    return *this;
  }

  // "BF16[2,512,16,128]"
  Failure& operator<<(const xla::ffi::AnyBuffer& buffer) {
    text_ << buffer.element_type() << '[';
    const char* separator = "";
    for (int64_t size : buffer.dimensions()) {
      text_ << separator << size;
      separator = ",";
    }
    text_ << ']';
    return *this;
  }

  operator xla::ffi::Error() const {  // NOLINT: `return Failure(...) << ...` is the point
    return xla::ffi::Error(code_, text_.str());
  }

 private:
  xla::ffi::ErrorCode code_;
  std::ostringstream text_;
};

}  // namespace flash2

#define FLASH2_CHECK(condition) \
  if (condition) {              \
  } else                        \
    return ::flash2::Failure(::xla::ffi::ErrorCode::kInvalidArgument)

// For a cudaError_t, or an int that holds one. cudaGetLastError may report what an earlier kernel
// of someone else did, so only a call's own result is asked.
#define FLASH2_CUDA(call)                                                                      \
  if (const auto flash2_error = static_cast<cudaError_t>(call); flash2_error == cudaSuccess) { \
  } else                                                                                       \
    return ::flash2::Failure(::xla::ffi::ErrorCode::kInternal)                                 \
           << #call " failed: " << cudaGetErrorName(flash2_error) << ", "                      \
           << cudaGetErrorString(flash2_error) << ' '

#define FLASH2_RETURN_IF_ERROR(call)                                     \
  if (::xla::ffi::Error flash2_status = call; flash2_status.success()) { \
  } else                                                                 \
    return flash2_status
