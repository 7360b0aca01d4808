// The backward's handler: see handlers.cc.

#include <cuda_runtime_api.h>

#include "decode.h"
#include "handlers.h"
#include "plan.h"
#include "problem.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace flash2 {
namespace {

struct BackwardAttributes : Attributes {
  bool deterministic;

  BackwardAttributes(std::string_view operands, float scale, float soft_cap, bool is_causal,
                     int32_t window_left, int32_t window_right, int32_t chunk_size, int32_t family,
                     bool deterministic)
      : Attributes{operands,    scale,        soft_cap,   is_causal,
                   window_left, window_right, chunk_size, family},
        deterministic(deterministic) {}
};

}  // namespace
}  // namespace flash2

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    flash2::BackwardAttributes, xla::ffi::StructMember<std::string_view>("operands"),
    xla::ffi::StructMember<float>("scale"), xla::ffi::StructMember<float>("soft_cap"),
    xla::ffi::StructMember<bool>("is_causal"), xla::ffi::StructMember<int32_t>("window_left"),
    xla::ffi::StructMember<int32_t>("window_right"), xla::ffi::StructMember<int32_t>("chunk_size"),
    xla::ffi::StructMember<int32_t>("family"), xla::ffi::StructMember<bool>("deterministic"));

namespace flash2 {
namespace {

using ffi::AnyBuffer;
using ffi::Error;
using ffi::Result;

// An array of the backward's own: its rules, and where the problem keeps it.
template <class Pointer>
Error set_array(const char* name, AnyBuffer x, AnyBuffer query, bool of_query, int32_t head_dim,
                const Problem& problem, Pointer* pointer, Strides* stride) {
  FLASH2_RETURN_IF_ERROR(check_array(name, x, query, problem.batch));
  FLASH2_RETURN_IF_ERROR(check_shape(name, x, problem, of_query, head_dim));
  *pointer = x.untyped_data();
  *stride = strides(x);
  return Error::Success();
}

// Operands: query, key, value, out, dout, lse, then what `operands` names, "dlse" among it.
// Results: gradients of query, key and value, a workspace and, where it is wanted, what each query
// row adds to the gradient of the scale.
Error backward(cudaStream_t stream, int32_t ordinal, AnyBuffer query, AnyBuffer key,
               AnyBuffer value, AnyBuffer out, AnyBuffer dout, AnyBuffer lse,
               ffi::RemainingArgs sides, Result<AnyBuffer> dquery, Result<AnyBuffer> dkey,
               Result<AnyBuffer> dvalue, Result<AnyBuffer> workspace, ffi::RemainingRets more,
               const BackwardAttributes& attributes) {
  BackwardProblem p;
  FLASH2_CHECK(dquery->dimensions().size() == 4)
      << "query's gradient must have shape [batch, length, heads, head_dim]; got " << *dquery;
  FLASH2_RETURN_IF_ERROR(
      decode_problem(query, key, value, dquery->dimensions()[0], attributes, &p));
  FLASH2_RETURN_IF_ERROR(
      set_array("out", out, query, true, p.head_dim_v, p, &p.out, &p.out_stride));
  FLASH2_RETURN_IF_ERROR(
      set_array("dout", dout, query, true, p.head_dim_v, p, &p.dout, &p.dout_stride));
  FLASH2_RETURN_IF_ERROR(set_array("query's gradient", *dquery, query, true, p.head_dim, p,
                                   &p.dquery, &p.dquery_stride));
  FLASH2_RETURN_IF_ERROR(
      set_array("key's gradient", *dkey, query, false, p.head_dim, p, &p.dkey, &p.dkey_stride));
  FLASH2_RETURN_IF_ERROR(set_array("value's gradient", *dvalue, query, false, p.head_dim_v, p,
                                   &p.dvalue, &p.dvalue_stride));
  FLASH2_RETURN_IF_ERROR(check_row_values("lse", lse, p));
  p.lse = static_cast<const float*>(lse.untyped_data());
  p.deterministic = attributes.deterministic;
  FLASH2_RETURN_IF_ERROR(
      for_each_side(attributes.operands, sides, [&](std::string_view name, AnyBuffer x) -> Error {
        if (name != "dlse") return set_side(name, x, &p);
        FLASH2_RETURN_IF_ERROR(check_row_values("dlse", x, p));
        p.dlse = static_cast<const float*>(x.untyped_data());
        return Error::Success();
      }));
  if (more.size() != 0) {
    auto rows = more.get<AnyBuffer>(0);
    FLASH2_CHECK(rows.has_value()) << "the scale's gradient is no buffer";
    FLASH2_RETURN_IF_ERROR(check_row_values("the scale's gradient", **rows, p));
    p.dscale_rows = static_cast<float*>((*rows)->untyped_data());
  }

  Device device;
  FLASH2_CUDA(query_device(ordinal, &device));
  const BackwardPlan plan = plan_backward(device, p, attributes.family);
  FLASH2_RETURN_IF_ERROR(judge(plan.status, query, key, value, p, device));
  FLASH2_CHECK(static_cast<int64_t>(workspace->size_bytes()) >= plan.workspace.bytes)
      << "the workspace must hold " << plan.workspace.bytes << " bytes; got " << *workspace;
  const CurrentDevice current(ordinal);
  FLASH2_CUDA(current.status());
  FLASH2_CUDA(launch_backward(p, plan, workspace->untyped_data(), stream));
  return Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kHandler, backward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .RemainingRets()
                           .Attrs<BackwardAttributes>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

XLA_FFI_Handler* const kBackward = kHandler;

}  // namespace flash2
