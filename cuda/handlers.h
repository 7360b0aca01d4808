// What module.cc gives to XLA. The names are the contract with jax_flash2/_ffi.py: whoever changes
// a handler's operands, results or attributes raises its version, so that no compiled program of
// before (a persistent cache, an export) reaches a handler that reads it otherwise.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace flash2 {

struct Registration {
  const char* target;
  XLA_FFI_Handler* handler;
};

extern XLA_FFI_Handler* const kBackward;

extern const Registration kRegistrations[2];

}  // namespace flash2
