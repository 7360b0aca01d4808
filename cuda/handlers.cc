// The forward's handler, and the table of all. With handlers_backward.cc and decode.cc the only
// files that know XLA: from buffers and attributes to a Problem, from there to a launch. They
// allocate nothing and synchronise nothing, so that XLA may put the calls into command buffers.

#include "handlers.h"

#include <cuda_runtime_api.h>

#include "decode.h"
#include "plan.h"
#include "problem.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    flash2::Attributes, xla::ffi::StructMember<std::string_view>("operands"),
    xla::ffi::StructMember<float>("scale"), xla::ffi::StructMember<float>("soft_cap"),
    xla::ffi::StructMember<bool>("is_causal"), xla::ffi::StructMember<int32_t>("window_left"),
    xla::ffi::StructMember<int32_t>("window_right"), xla::ffi::StructMember<int32_t>("chunk_size"),
    xla::ffi::StructMember<int32_t>("family"));

namespace flash2 {
namespace {

using ffi::AnyBuffer;
using ffi::Error;
using ffi::Result;

Error decode(AnyBuffer query, AnyBuffer key, AnyBuffer value, AnyBuffer out, AnyBuffer lse,
             const Attributes& attributes, ForwardProblem* problem) {
  FLASH2_CHECK(out.dimensions().size() == 4)
      << "out must have shape [batch, length, heads, head_dim]; got " << out;
  const int64_t batch = out.dimensions()[0];
  FLASH2_RETURN_IF_ERROR(decode_problem(query, key, value, batch, attributes, problem));
  FLASH2_RETURN_IF_ERROR(check_array("out", out, query, batch));
  FLASH2_RETURN_IF_ERROR(check_shape("out", out, *problem, true, problem->head_dim_v));
  FLASH2_RETURN_IF_ERROR(check_row_values("lse", lse, *problem));
  problem->out = out.untyped_data();
  problem->lse = static_cast<float*>(lse.untyped_data());
  problem->out_stride = strides(out);
  return Error::Success();
}

// Operands: query, key, value, then what `operands` names. Results: out, lse and a workspace, of
// which the plan may want nothing.
Error forward(cudaStream_t stream, int32_t ordinal, AnyBuffer query, AnyBuffer key,
              AnyBuffer value, ffi::RemainingArgs sides, Result<AnyBuffer> out,
              Result<AnyBuffer> lse, ffi::RemainingRets workspaces, const Attributes& attributes) {
  ForwardProblem problem;
  FLASH2_RETURN_IF_ERROR(decode(query, key, value, *out, *lse, attributes, &problem));
  FLASH2_RETURN_IF_ERROR(for_each_side(
      attributes.operands, sides,
      [&](std::string_view name, AnyBuffer x) { return set_side(name, x, &problem); }));

  Device device;
  FLASH2_CUDA(query_device(ordinal, &device));
  const ForwardPlan plan = plan_forward(device, problem, attributes.family);
  FLASH2_RETURN_IF_ERROR(judge(plan.status, query, key, value, problem, device));
  if (plan.empty) return Error::Success();

  void* workspace = nullptr;
  if (workspaces.size() != 0) {
    auto buffer = workspaces.get<AnyBuffer>(0);
    FLASH2_CHECK(buffer.has_value()) << "the workspace is no buffer";
    FLASH2_CHECK((*buffer)->size_bytes() >= plan.workspace_bytes)
        << "the workspace must hold " << plan.workspace_bytes << " bytes; got " << **buffer;
    workspace = (*buffer)->untyped_data();
  } else {
    FLASH2_CHECK(plan.workspace_bytes == 0)
        << "a workspace of " << plan.workspace_bytes << " bytes is needed; got none";
  }
  const CurrentDevice current(ordinal);
  FLASH2_CUDA(current.status());
  FLASH2_CUDA(launch_forward(problem, plan, workspace, stream));
  return Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kForward, forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .RemainingRets()
                           .Attrs<Attributes>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

const Registration kRegistrations[2] = {{"flash2_forward_v2", kForward},
                                        {"flash2_backward_v1", kBackward}};

}  // namespace flash2
