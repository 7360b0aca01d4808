// Launches every kernel on small problems without XLA, for compute-sanitizer: exact allocations,
// outputs full of NaN before, and every element of them written after.
//
//   launch_test                 all problems; prints their number
//   launch_test --plant TOOL    a kernel with the fault that memcheck, racecheck or synccheck must
//                               find, to show that the tool sees what this program does

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "plan.h"
#include "problem.h"

using namespace flash2;

namespace {

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "launch_test: %s\n", what.c_str());
  std::exit(1);
}

void cuda(int error, const char* what) {
  require(error == cudaSuccess,
          std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// Device memory of exactly this size, freed at the end.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : size_(values.size()) {
    cuda(cudaMalloc(&data_, size_ * sizeof(T)), "cudaMalloc");
    cuda(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    cuda(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// Sixteen-bit words of small numbers: a bf16 or fp16 in [-2, 2].
std::vector<uint16_t> numbers(size_t size, DataType type) {
  std::vector<uint16_t> words(size);
  uint32_t state = 1;
  for (uint16_t& word : words) {
    state = state * 1664525u + 1013904223u;
    const float x = static_cast<int32_t>(state >> 8) / float(1 << 22) - 2.0f;
    if (type == DataType::kBFloat16) {
      const __nv_bfloat16 y = __float2bfloat16(x);
      std::memcpy(&word, &y, 2);
    } else {
      const __half y = __float2half(x);
      std::memcpy(&word, &y, 2);
    }
  }
  return words;
}

struct Shape {
  int seq_q, seq_kv, heads_kv;
};

struct Setting {
  const char* name;
  void (*set)(ForwardProblem&);
  bool lengths, segments, slopes;
};

constexpr int kBatch = 2, kHeads = 4;

const Setting kSettings[] = {
    {"plain", [](ForwardProblem&) {}, false, false, false},
    {"causal", [](ForwardProblem& p) { p.is_causal = true; }, false, false, false},
    {"causal offset",
     [](ForwardProblem& p) { p.is_causal = true, p.query_offset = p.seq_kv - p.seq_q; }, false,
     false, false},
    {"window", [](ForwardProblem& p) { p.window_left = 40, p.window_right = 9; }, false, false,
     false},
    {"chunk", [](ForwardProblem& p) { p.chunk_size = 48; }, false, false, false},
    {"lengths", [](ForwardProblem& p) { p.is_causal = true; }, true, false, false},
    {"segments", [](ForwardProblem&) {}, false, true, false},
    {"general", [](ForwardProblem& p) { p.is_causal = true, p.soft_cap = 5.0f; }, true, true,
     true},
};

void run(const Device& device, DataType type, int head_dim, Shape shape, const Setting& setting) {
  const size_t rows = size_t{kBatch} * shape.seq_q * kHeads;
  const size_t keys = size_t{kBatch} * shape.seq_kv * shape.heads_kv;
  const Array<uint16_t> q(numbers(rows * head_dim, type)), k(numbers(keys * head_dim, type)),
      v(numbers(keys * head_dim, type)), out(std::vector<uint16_t>(rows * head_dim, 0xffff));
  const Array<float> lse(std::vector<float>(rows, NAN)),
      per_head(std::vector<float>(kHeads, 0.25f));
  const Array<int32_t> q_lengths({shape.seq_q / 2, shape.seq_q}),
      kv_lengths({shape.seq_kv, shape.seq_kv / 3});
  std::vector<int32_t> ids(std::max(shape.seq_q, shape.seq_kv));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i / 37);
  const Array<int32_t> segments(ids);

  ForwardProblem p;
  p.query = q.data(), p.key = k.data(), p.value = v.data();
  p.out = out.data(), p.lse = lse.data();
  p.data_type = type;
  p.batch = kBatch, p.heads_q = kHeads, p.heads_kv = shape.heads_kv;
  p.seq_q = shape.seq_q, p.seq_kv = shape.seq_kv;
  p.head_dim = p.head_dim_v = head_dim;
  p.scale = 0.125f;
  const auto strides = [&](int64_t length, int64_t heads) {
    return Strides{length * heads * head_dim, heads * head_dim, head_dim};
  };
  p.query_stride = p.out_stride = strides(shape.seq_q, kHeads);
  p.key_stride = p.value_stride = strides(shape.seq_kv, shape.heads_kv);
  setting.set(p);
  if (setting.lengths) {
    p.query_seq_lengths = {q_lengths.data(), 1};
    p.key_value_seq_lengths = {kv_lengths.data(), 1};
  }
  if (setting.segments) {
    p.query_segment_ids = {segments.data(), 0};
    p.key_value_segment_ids = {segments.data(), 0};
  }
  if (setting.slopes) p.alibi_slopes = p.sinks = {per_head.data(), 0, 1};

  const std::string name = std::string(setting.name) + ", head_dim " + std::to_string(head_dim) +
                           ", lengths " + std::to_string(shape.seq_q) + "/" +
                           std::to_string(shape.seq_kv);
  const ForwardPlan plan = plan_forward(device, p);
  require(plan.status == PlanStatus::kOk, name + ": " + describe(plan.status));
  cuda(launch_forward(p, plan, nullptr, nullptr), name.c_str());
  cuda(cudaDeviceSynchronize(), name.c_str());
  for (float x : lse.host()) require(!std::isnan(x), name + ": lse has NaN");
  for (uint16_t x : out.host()) {
    const int exponent = type == DataType::kBFloat16 ? 0x7f80 : 0x7c00;
    require((x & exponent) != exponent, name + ": out has inf or NaN");
  }
}

// --- Planted faults
// ------------------------------------------------------------------------------

__global__ void write_past_the_end(int* data, int size) { data[size + threadIdx.x] = 1; }

__global__ void read_without_barrier(int* data) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  data[threadIdx.x] = shared[63 - threadIdx.x];
}

// Half of the warp waits for the other half, which has gone.
__global__ void diverge_at_barrier(int* data) {
  if (threadIdx.x < 16) __syncthreads();
  data[threadIdx.x] = 1;
}

void plant(const std::string& tool) {
  const Array<int> data(std::vector<int>(64));
  if (tool == "memcheck") {
    write_past_the_end<<<1, 32>>>(data.data(), 1024);
  } else if (tool == "racecheck") {
    read_without_barrier<<<1, 64>>>(data.data());
  } else if (tool == "synccheck") {
    diverge_at_barrier<<<1, 32>>>(data.data());
  } else {
    require(false, "no planted fault for " + tool);
  }
  cudaDeviceSynchronize();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--plant") == 0) {
    plant(argv[2]);
    return 0;
  }
  require(argc == 1, "usage: launch_test [--plant memcheck|racecheck|synccheck]");
  Device device;
  cuda(query_device(0, &device), "query_device");
  int problems = 0;
  // 232448 bytes on Hopper, 101376 on 8.6 and 8.9: the tiles of every device are tried.
  for (int32_t smem : {device.smem_per_block, 166912, 101376}) {
    if (smem > device.smem_per_block) continue;
    Device d = device;
    d.smem_per_block = smem;
    d.smem_per_sm = smem + 1024;
    for (DataType type : {DataType::kBFloat16, DataType::kFloat16}) {
      for (int head_dim : {64, 40, 128, 256, 200}) {
        for (const Setting& setting : kSettings) {
          for (Shape shape : {Shape{130, 200, 2}, Shape{3, 65, 4}, Shape{257, 70, 1}}) {
            run(d, type, head_dim, shape, setting);
            ++problems;
          }
        }
      }
    }
  }
  std::printf("%d problems\n", problems);
}
