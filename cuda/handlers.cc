// The only file that knows XLA: from buffers and attributes to a Problem, from there to a launch.
// It allocates nothing and synchronises nothing, so that XLA may put the calls into command
// buffers.

#include "handlers.h"

#include <cuda_runtime_api.h>

#include <limits>
#include <string_view>

#include "plan.h"
#include "problem.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace flash2 {
namespace {

// The static facts of a call, by the names of jax_flash2/_ffi.py.
struct ForwardAttributes {
  std::string_view operands;  // names of the optional operands in their order, comma-separated
  float scale;                // a factor of the operand, where there is one
  float soft_cap;
  bool is_causal;
  int32_t window_left;
  int32_t window_right;
  int32_t chunk_size;
  int32_t family;  // of plan_forward
};

}  // namespace
}  // namespace flash2

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    flash2::ForwardAttributes, xla::ffi::StructMember<std::string_view>("operands"),
    xla::ffi::StructMember<float>("scale"), xla::ffi::StructMember<float>("soft_cap"),
    xla::ffi::StructMember<bool>("is_causal"), xla::ffi::StructMember<int32_t>("window_left"),
    xla::ffi::StructMember<int32_t>("window_right"), xla::ffi::StructMember<int32_t>("chunk_size"),
    xla::ffi::StructMember<int32_t>("family"));

namespace flash2 {
namespace {

using ffi::AnyBuffer;
using ffi::Error;
using ffi::Result;

// XLA makes the device current before it calls us, but does not promise it.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t ordinal) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != ordinal) {
      status_ = cudaSetDevice(ordinal);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// Arrays come row-major, [batch or 1, length, heads, head_dim].
Strides strides(AnyBuffer x) {
  const auto shape = x.dimensions();
  Strides s;
  s.head = shape[3];
  s.row = s.head * shape[2];
  s.batch = shape[0] == 1 ? 0 : s.row * shape[1];
  return s;
}

template <class T>
PerBatch<T> per_batch(AnyBuffer x) {
  const auto shape = x.dimensions();
  const int64_t stride = x.element_count() / (shape[0] == 0 ? 1 : shape[0]);
  return {static_cast<const T*>(x.untyped_data()), shape[0] == 1 ? 0 : stride};
}

PerHead per_head(AnyBuffer x) {
  const auto shape = x.dimensions();
  return {static_cast<const float*>(x.untyped_data()), shape[0] == 1 ? 0 : shape[1],
          shape[1] == 1 ? 0 : 1};
}

Error check_array(const char* name, AnyBuffer x, AnyBuffer query, int64_t batch) {
  const auto shape = x.dimensions();
  FLASH2_CHECK(shape.size() == 4) << name
                                  << " must have shape [batch, length, heads, head_dim]; got "
                                  << x;
  FLASH2_CHECK(x.element_type() == query.element_type())
      << name << " must have query's dtype, " << query.element_type() << "; got " << x;
  FLASH2_CHECK(shape[0] == batch || shape[0] == 1)
      << name << "'s batch must be " << batch << " or 1; got " << x;
  for (int64_t size : shape) {
    FLASH2_CHECK(size <= std::numeric_limits<int32_t>::max())
        << "every axis of " << name << " must be below 2^31; got " << x;
  }
  return Error::Success();
}

// `tail` is the axis after the batch: 0 for none.
Error check_side(std::string_view name, AnyBuffer x, ffi::DataType dtype, int64_t batch,
                 int64_t tail, bool may_be_one) {
  const auto shape = x.dimensions();
  FLASH2_CHECK(x.element_type() == dtype) << name << " must be " << dtype << "; got " << x;
  FLASH2_CHECK(shape.size() == (tail == 0 ? 1u : 2u))
      << name << " must have " << (tail == 0 ? 1 : 2) << " axes; got " << x;
  FLASH2_CHECK(shape[0] == batch || shape[0] == 1)
      << name << "'s batch must be " << batch << " or 1; got " << x;
  if (tail != 0) {
    FLASH2_CHECK(shape[1] == tail || (may_be_one && shape[1] == 1))
        << name << "'s second axis must be " << tail << "; got " << x;
  }
  return Error::Success();
}

// Gives the optional operand `name` to the problem.
Error set_side(std::string_view name, AnyBuffer x, ForwardProblem* problem) {
  struct IntegerField {
    std::string_view name;
    PerBatch<int32_t> ForwardProblem::* field;
    int64_t tail;
  };
  const IntegerField integers[] = {
      {"query_offset", &ForwardProblem::query_offset_operand, 0},
      {"query_seq_lengths", &ForwardProblem::query_seq_lengths, 0},
      {"key_value_seq_lengths", &ForwardProblem::key_value_seq_lengths, 0},
      {"prefix_lengths", &ForwardProblem::prefix_lengths, 0},
      {"query_segment_ids", &ForwardProblem::query_segment_ids, problem->seq_q},
      {"key_value_segment_ids", &ForwardProblem::key_value_segment_ids, problem->seq_kv},
  };
  for (const IntegerField& f : integers) {
    if (f.name != name) continue;
    FLASH2_RETURN_IF_ERROR(check_side(name, x, ffi::S32, problem->batch, f.tail, false));
    problem->*f.field = per_batch<int32_t>(x);
    return Error::Success();
  }
  if (name == "scale") {
    FLASH2_RETURN_IF_ERROR(check_side(name, x, ffi::F32, problem->batch, 0, false));
    problem->scale_operand = per_batch<float>(x);
    return Error::Success();
  }
  const bool slopes = name == "alibi_slopes";
  FLASH2_CHECK(slopes || name == "sinks") << "unknown operand '" << name << "', " << x;
  FLASH2_RETURN_IF_ERROR(check_side(name, x, ffi::F32, problem->batch, problem->heads_q, true));
  (slopes ? problem->alibi_slopes : problem->sinks) = per_head(x);
  return Error::Success();
}

Error set_sides(std::string_view names, ffi::RemainingArgs sides, ForwardProblem* problem) {
  size_t count = 0;
  while (!names.empty()) {
    const size_t comma = names.find(',');
    const std::string_view name = names.substr(0, comma);
    names = comma == std::string_view::npos ? std::string_view() : names.substr(comma + 1);
    auto side = sides.get<AnyBuffer>(count++);
    FLASH2_CHECK(side.has_value()) << "operand '" << name << "' is named but not given";
    FLASH2_RETURN_IF_ERROR(set_side(name, *side, problem));
  }
  FLASH2_CHECK(count == sides.size())
      << count << " optional operands are named; got " << sides.size();
  return Error::Success();
}

Error decode(AnyBuffer query, AnyBuffer key, AnyBuffer value, AnyBuffer out, AnyBuffer lse,
             const ForwardAttributes& attributes, ForwardProblem* problem) {
  FLASH2_CHECK(query.element_type() == ffi::F16 || query.element_type() == ffi::BF16)
      << "query must be float16 or bfloat16; got " << query;
  FLASH2_CHECK(out.dimensions().size() == 4)
      << "out must have shape [batch, length, heads, head_dim]; got " << out;
  const int64_t batch = out.dimensions()[0];
  FLASH2_RETURN_IF_ERROR(check_array("query", query, query, batch));
  FLASH2_RETURN_IF_ERROR(check_array("key", key, query, batch));
  FLASH2_RETURN_IF_ERROR(check_array("value", value, query, batch));
  FLASH2_RETURN_IF_ERROR(check_array("out", out, query, batch));
  const auto q = query.dimensions(), k = key.dimensions(), v = value.dimensions(),
             o = out.dimensions(), l = lse.dimensions();
  FLASH2_CHECK(k[3] == q[3]) << "key's head_dim must be query's, " << q[3] << "; got " << key;
  FLASH2_CHECK(v[1] == k[1] && v[2] == k[2])
      << "value must have key's length " << k[1] << " and heads " << k[2] << "; got " << value;
  FLASH2_CHECK(o[1] == q[1] && o[2] == q[2] && o[3] == v[3])
      << "out must be [" << batch << ',' << q[1] << ',' << q[2] << ',' << v[3] << "]; got " << out;
  FLASH2_CHECK(lse.element_type() == ffi::F32 && l.size() == 3 && l[0] == batch && l[1] == q[2] &&
               l[2] == q[1])
      << "lse must be F32[" << batch << ',' << q[2] << ',' << q[1] << "]; got " << lse;

  problem->query = query.untyped_data();
  problem->key = key.untyped_data();
  problem->value = value.untyped_data();
  problem->out = out.untyped_data();
  problem->lse = static_cast<float*>(lse.untyped_data());
  problem->query_stride = strides(query);
  problem->key_stride = strides(key);
  problem->value_stride = strides(value);
  problem->out_stride = strides(out);
  problem->data_type = query.element_type() == ffi::F16 ? DataType::kFloat16 : DataType::kBFloat16;
  problem->batch = static_cast<int32_t>(batch);
  problem->heads_q = static_cast<int32_t>(q[2]);
  problem->heads_kv = static_cast<int32_t>(k[2]);
  problem->seq_q = static_cast<int32_t>(q[1]);
  problem->seq_kv = static_cast<int32_t>(k[1]);
  problem->head_dim = static_cast<int32_t>(q[3]);
  problem->head_dim_v = static_cast<int32_t>(v[3]);
  problem->scale = attributes.scale;
  problem->soft_cap = attributes.soft_cap;
  problem->is_causal = attributes.is_causal;
  problem->window_left = attributes.window_left;
  problem->window_right = attributes.window_right;
  problem->chunk_size = attributes.chunk_size;
  return Error::Success();
}

// Operands: query, key, value, then what `operands` names. Results: out, lse and a workspace, of
// which the plan may want nothing.
Error forward(cudaStream_t stream, int32_t ordinal, AnyBuffer query, AnyBuffer key,
              AnyBuffer value, ffi::RemainingArgs sides, Result<AnyBuffer> out,
              Result<AnyBuffer> lse, ffi::RemainingRets workspaces,
              const ForwardAttributes& attributes) {
  ForwardProblem problem;
  FLASH2_RETURN_IF_ERROR(decode(query, key, value, *out, *lse, attributes, &problem));
  FLASH2_RETURN_IF_ERROR(set_sides(attributes.operands, sides, &problem));

  Device device;
  FLASH2_CUDA(query_device(ordinal, &device));
  const ForwardPlan plan = plan_forward(device, problem, attributes.family);
  FLASH2_CHECK(plan.status == PlanStatus::kOk)
      << describe(plan.status) << " (query " << query << ", key " << key << ", value " << value
      << ", window (" << problem.window_left << ", " << problem.window_right << "), chunk "
      << problem.chunk_size << ", soft cap " << problem.soft_cap << ", compute capability "
      << device.compute_capability / 10 << '.' << device.compute_capability % 10 << ')';
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
                           .Attrs<ForwardAttributes>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

const Registration kRegistrations[1] = {{"flash2_forward_v2", kForward}};

}  // namespace flash2
