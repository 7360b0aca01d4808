#include "decode.h"

#include <limits>

namespace ffi = xla::ffi;

namespace flash2 {

using ffi::AnyBuffer;
using ffi::Error;

CurrentDevice::CurrentDevice(int32_t ordinal) {
  status_ = cudaGetDevice(&before_);
  if (status_ == cudaSuccess && before_ != ordinal) {
    status_ = cudaSetDevice(ordinal);
    changed_ = status_ == cudaSuccess;
  }
}

CurrentDevice::~CurrentDevice() {
  if (changed_) cudaSetDevice(before_);
}

Strides strides(AnyBuffer x) {
  const auto shape = x.dimensions();
  Strides s;
  s.head = shape[3];
  s.row = s.head * shape[2];
  s.batch = shape[0] == 1 ? 0 : s.row * shape[1];
  return s;
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

Error check_shape(const char* name, AnyBuffer x, const Problem& p, bool of_query,
                  int32_t head_dim) {
  const auto shape = x.dimensions();
  const int64_t length = of_query ? p.seq_q : p.seq_kv, heads = of_query ? p.heads_q : p.heads_kv;
  FLASH2_CHECK(shape[1] == length && shape[2] == heads && shape[3] == head_dim)
      << name << " must be [" << p.batch << ',' << length << ',' << heads << ',' << head_dim
      << "]; got " << x;
  return Error::Success();
}

Error check_row_values(const char* name, AnyBuffer x, const Problem& p) {
  const auto shape = x.dimensions();
  FLASH2_CHECK(x.element_type() == ffi::F32 && shape.size() == 3 && shape[0] == p.batch &&
               shape[1] == p.heads_q && shape[2] == p.seq_q)
      << name << " must be F32[" << p.batch << ',' << p.heads_q << ',' << p.seq_q << "]; got "
      << x;
  return Error::Success();
}

Error decode_problem(AnyBuffer query, AnyBuffer key, AnyBuffer value, int64_t batch,
                     const Attributes& attributes, Problem* problem) {
  FLASH2_CHECK(query.element_type() == ffi::F16 || query.element_type() == ffi::BF16)
      << "query must be float16 or bfloat16; got " << query;
  FLASH2_RETURN_IF_ERROR(check_array("query", query, query, batch));
  FLASH2_RETURN_IF_ERROR(check_array("key", key, query, batch));
  FLASH2_RETURN_IF_ERROR(check_array("value", value, query, batch));
  const auto q = query.dimensions(), k = key.dimensions(), v = value.dimensions();
  FLASH2_CHECK(k[3] == q[3]) << "key's head_dim must be query's, " << q[3] << "; got " << key;
  FLASH2_CHECK(v[1] == k[1] && v[2] == k[2])
      << "value must have key's length " << k[1] << " and heads " << k[2] << "; got " << value;

  problem->query = query.untyped_data();
  problem->key = key.untyped_data();
  problem->value = value.untyped_data();
  problem->query_stride = strides(query);
  problem->key_stride = strides(key);
  problem->value_stride = strides(value);
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

namespace {

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

}  // namespace

Error set_side(std::string_view name, AnyBuffer x, Problem* problem) {
  struct IntegerField {
    std::string_view name;
    PerBatch<int32_t> Problem::* field;
    int64_t tail;
  };
  const IntegerField integers[] = {
      {"query_offset", &Problem::query_offset_operand, 0},
      {"query_seq_lengths", &Problem::query_seq_lengths, 0},
      {"key_value_seq_lengths", &Problem::key_value_seq_lengths, 0},
      {"prefix_lengths", &Problem::prefix_lengths, 0},
      {"query_segment_ids", &Problem::query_segment_ids, problem->seq_q},
      {"key_value_segment_ids", &Problem::key_value_segment_ids, problem->seq_kv},
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

Error judge(PlanStatus status, AnyBuffer query, AnyBuffer key, AnyBuffer value, const Problem& p,
            const Device& device) {
  FLASH2_CHECK(status == PlanStatus::kOk)
      << describe(status) << " (query " << query << ", key " << key << ", value " << value
      << ", window (" << p.window_left << ", " << p.window_right << "), chunk " << p.chunk_size
      << ", soft cap " << p.soft_cap << ", compute capability " << device.compute_capability / 10
      << '.' << device.compute_capability % 10 << ')';
  return Error::Success();
}

}  // namespace flash2
