// Launches every kernel, forward and backward, on small problems without XLA, for
// compute-sanitizer: exact allocations, outputs full of NaN before, and every element of them
// written after.
//
//   launch_test                  all problems; prints their names and their number. Every tile of
//                                Hopper's tables must be among them
//   launch_test --part I N [T]   every N-th of them, from the I-th on; T times each
//   launch_test --only NAME [T]  the one of that name; prints all names where none is that
//   launch_test --plant TOOL     a kernel with the fault that memcheck, racecheck or synccheck
//                                must find, to show that the tool sees what this program does

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "plan.h"
#include "problem.h"
#include "sm90/backward_tiles.h"
#include "sm90/tiles.h"

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
  void (*set)(Problem&);
  bool lengths;
  enum { kNone, kPacked, kMixed } segments;
  bool slopes;
};

constexpr int kBatch = 2, kHeads = 4;

const Setting kSettings[] = {
    {"plain", [](Problem&) {}, false, Setting::kNone, false},
    {"causal", [](Problem& p) { p.is_causal = true; }, false, Setting::kNone, false},
    {"causal offset", [](Problem& p) { p.is_causal = true, p.query_offset = p.seq_kv - p.seq_q; },
     false, Setting::kNone, false},
    {"window", [](Problem& p) { p.window_left = 40, p.window_right = 9; }, false, Setting::kNone,
     false},
    {"chunk", [](Problem& p) { p.chunk_size = 48; }, false, Setting::kNone, false},
    {"lengths", [](Problem& p) { p.is_causal = true; }, true, Setting::kNone, false},
    {"segments", [](Problem&) {}, false, Setting::kPacked, false},
    {"causal mixed segments", [](Problem& p) { p.is_causal = true; }, false, Setting::kMixed,
     false},
    {"general", [](Problem& p) { p.is_causal = true, p.soft_cap = 5.0f; }, true, Setting::kPacked,
     true},
};

// Hopper's alone: the others have their soft caps in "general".
const Setting kCapped{"causal soft cap", [](Problem& p) { p.is_causal = true, p.soft_cap = 5.0f; },
                      false, Setting::kNone, false};

// One problem. Its name tells all of it, so that it means the same however others come and go.
struct Case {
  const Setting* setting;
  DataType type;
  int head_dim;
  Shape shape;
  int32_t family;  // as in plan_forward and plan_backward
  bool deterministic;
  int32_t smem = 0;  // the device's bytes of shared memory a block, and its multiprocessors;
  int num_sms = 0;   // 0: as many as it has
  bool scale_gradient = true;  // some kernels serve only calls without

  std::string name() const {
    const auto pair = [](int a, int b) { return std::to_string(a) + "/" + std::to_string(b); };
    std::string text = setting->name;
    text += type == DataType::kBFloat16 ? ", bfloat16" : ", float16";
    text += ", head_dim " + std::to_string(head_dim);
    text += ", lengths " + pair(shape.seq_q, shape.seq_kv);
    text += ", heads " + pair(kHeads, shape.heads_kv);
    text += ", family " + std::to_string(family);
    if (deterministic) text += ", deterministic";
    if (smem > 0) text += ", smem " + std::to_string(smem);
    if (num_sms > 0) text += ", sms " + std::to_string(num_sms);
    if (!scale_gradient) text += ", no gradient of the scale";
    return text;
  }
  Device on(Device device) const {
    if (smem > 0) device.smem_per_block = smem, device.smem_per_sm = smem + 1024;
    if (num_sms > 0) device.num_sms = num_sms;
    return device;
  }
};

// What both passes take, and where their results go.
struct Arrays {
  Array<uint16_t> q, k, v, out;
  Array<float> lse, per_head;
  Array<int32_t> q_lengths, kv_lengths, packed, mixed;

  Arrays(DataType type, int head_dim, Shape shape)
      : q(numbers(rows(shape) * head_dim, type)),
        k(numbers(keys(shape) * head_dim, type)),
        v(numbers(keys(shape) * head_dim, type)),
        out(unwritten(rows(shape) * head_dim)),
        lse(std::vector<float>(rows(shape), NAN)),
        per_head(std::vector<float>(kHeads, 0.25f)),
        q_lengths({shape.seq_q / 2, shape.seq_q}),
        kv_lengths({shape.seq_kv, shape.seq_kv / 3}),
        packed(ids(std::max(shape.seq_q, shape.seq_kv), 37, INT_MAX)),
        mixed(ids(std::max(shape.seq_q, shape.seq_kv), 19, 3)) {}

  static size_t rows(Shape shape) { return size_t{kBatch} * shape.seq_q * kHeads; }
  static size_t keys(Shape shape) { return size_t{kBatch} * shape.seq_kv * shape.heads_kv; }
  static std::vector<uint16_t> unwritten(size_t size) {
    return std::vector<uint16_t>(size, 0xffff);
  }
  // Runs of so many places each; after so many of them the ids come again.
  static std::vector<int32_t> ids(size_t size, int run, int runs) {
    std::vector<int32_t> found(size);
    for (size_t i = 0; i < size; ++i) found[i] = static_cast<int32_t>(i) / run % runs;
    return found;
  }
};

Strides strides(int64_t length, int64_t heads, int64_t head_dim) {
  return Strides{length * heads * head_dim, heads * head_dim, head_dim};
}

void fill(Problem& p, const Arrays& a, DataType type, int head_dim, Shape shape,
          const Setting& setting) {
  p.query = a.q.data(), p.key = a.k.data(), p.value = a.v.data();
  p.data_type = type;
  p.batch = kBatch, p.heads_q = kHeads, p.heads_kv = shape.heads_kv;
  p.seq_q = shape.seq_q, p.seq_kv = shape.seq_kv;
  p.head_dim = p.head_dim_v = head_dim;
  p.scale = 0.125f;
  p.query_stride = strides(shape.seq_q, kHeads, head_dim);
  p.key_stride = p.value_stride = strides(shape.seq_kv, shape.heads_kv, head_dim);
  setting.set(p);
  if (setting.lengths) {
    p.query_seq_lengths = {a.q_lengths.data(), 1};
    p.key_value_seq_lengths = {a.kv_lengths.data(), 1};
  }
  if (setting.segments != Setting::kNone) {
    const int32_t* ids = setting.segments == Setting::kPacked ? a.packed.data() : a.mixed.data();
    p.query_segment_ids = p.key_value_segment_ids = {ids, 0};
  }
  if (setting.slopes) p.alibi_slopes = p.sinks = {a.per_head.data(), 0, 1};
}

void require_finite(const Array<uint16_t>& array, DataType type, const std::string& name) {
  const int exponent = type == DataType::kBFloat16 ? 0x7f80 : 0x7c00;
  for (uint16_t x : array.host()) {
    require((x & exponent) != exponent, name + " has inf or NaN");
  }
}

// The tiles of Hopper's tables that the problems so far have reached.
std::set<int> forward_tiles, backward_tiles;

void require_all(const std::set<int>& reached, int count, const char* table) {
  for (int tile = 0; tile < count; ++tile) {
    require(reached.count(tile),
            "no problem reaches tile " + std::to_string(tile) + " of " + table);
  }
}

// FNV-1a over the results that are the same in every run, however the warps were delayed.
uint64_t results = 0xcbf29ce484222325u;

template <class T>
void add_results(const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) {
    results = (results ^ bytes[i]) * 0x100000001b3u;
  }
}

void run(const Device& actual, const Case& c) {
  const Device device = c.on(actual);
  const Setting& setting = *c.setting;
  const DataType type = c.type;
  const int head_dim = c.head_dim;
  const Shape shape = c.shape;
  const std::string name = c.name();
  const Arrays a(type, head_dim, shape);
  ForwardProblem f;
  fill(f, a, type, head_dim, shape, setting);
  f.out = a.out.data(), f.lse = a.lse.data();
  f.out_stride = f.query_stride;
  const ForwardPlan forward = plan_forward(device, f, c.family);
  require(forward.status == PlanStatus::kOk, name + ": " + describe(forward.status));
  if (forward.family == 90) forward_tiles.insert(forward.variant);
  const Array<uint8_t> forward_workspace(
      std::vector<uint8_t>(std::max<size_t>(forward.workspace_bytes, 1), 0xff));
  cuda(launch_forward(f, forward, forward_workspace.data(), nullptr), name.c_str());
  cuda(cudaDeviceSynchronize(), name.c_str());
  for (float x : a.lse.host()) require(!std::isnan(x), name + ": lse has NaN");
  require_finite(a.out, type, name + ": out");
  add_results(a.lse.host());
  add_results(a.out.host());

  const Array<uint16_t> dout(numbers(Arrays::rows(shape) * head_dim, type)),
      dq(Arrays::unwritten(Arrays::rows(shape) * head_dim)),
      dk(Arrays::unwritten(Arrays::keys(shape) * head_dim)),
      dv(Arrays::unwritten(Arrays::keys(shape) * head_dim));
  const Array<float> dlse(std::vector<float>(Arrays::rows(shape), 0.5f)),
      dscale_rows(std::vector<float>(Arrays::rows(shape), NAN));
  BackwardProblem b;
  fill(b, a, type, head_dim, shape, setting);
  b.out = a.out.data(), b.dout = dout.data(), b.lse = a.lse.data(), b.dlse = dlse.data();
  b.dquery = dq.data(), b.dkey = dk.data(), b.dvalue = dv.data();
  if (c.scale_gradient) b.dscale_rows = dscale_rows.data();
  b.out_stride = b.dout_stride = b.dquery_stride = b.query_stride;
  b.dkey_stride = b.dvalue_stride = b.key_stride;
  b.deterministic = c.deterministic;
  const BackwardPlan backward = plan_backward(device, b, c.family);
  require(backward.status == PlanStatus::kOk, name + ": " + describe(backward.status));
  if (backward.family == 90) backward_tiles.insert(backward.variant);
  const Array<uint8_t> workspace(std::vector<uint8_t>(backward.workspace.bytes, 0xff));
  cuda(launch_backward(b, backward, workspace.data(), nullptr), name.c_str());
  cuda(cudaDeviceSynchronize(), name.c_str());
  require_finite(dq, type, name + ": dq");
  require_finite(dk, type, name + ": dk");
  require_finite(dv, type, name + ": dv");
  add_results(dk.host());
  add_results(dv.host());
  if (c.deterministic) add_results(dq.host());
  if (!c.scale_gradient) return;
  for (float x : dscale_rows.host()) require(!std::isnan(x), name + ": dscale has NaN");
}

std::vector<Case> cases(const Device& device) {
  std::vector<Case> found;
  constexpr Shape kShapes[] = {{130, 200, 2}, {3, 65, 4}, {257, 70, 1}};
  // 232448 bytes on Hopper, 101376 on 8.6 and 8.9: the tiles of every device are tried.
  for (int32_t smem : {0, 166912, 101376}) {
    if (smem > device.smem_per_block) continue;
    for (DataType type : {DataType::kBFloat16, DataType::kFloat16}) {
      // The dtype changes no address and no barrier: racecheck takes a second a launch.
      const bool whole = smem == 0 || smem == device.smem_per_block;
      if (type == DataType::kFloat16 && !whole) continue;
      for (int head_dim : {64, 40, 128, 256, 200}) {
        for (const Setting& setting : kSettings) {
          if (setting.segments == Setting::kMixed) continue;  // packed or not, these do the same
          const int number = static_cast<int>(found.size());
          // One shape each, another for each dtype.
          const Shape shape = kShapes[(number + static_cast<int>(type)) % 3];
          const bool deterministic = (number + 1) / 3 % 2 == 0;
          found.push_back({&setting, type, head_dim, shape, 80, deterministic, smem});
        }
      }
    }
  }
  if (device.compute_capability != 90) return found;
  // The family of 9.0, with and without ragged keys; what it does not serve has been tried above.
  // The last two pack the heads of a group, the first of them in a cluster where no window cuts.
  constexpr Shape kHopperShapes[] = {{130, 200, 2}, {3, 65, 4},   {257, 70, 1},
                                     {200, 256, 2}, {5, 4100, 1}, {16, 129, 2}};
  std::vector<const Setting*> hopper_settings{&kCapped};
  for (const Setting& setting : kSettings) {
    if (!setting.slopes) hopper_settings.push_back(&setting);
  }
  for (DataType type : {DataType::kBFloat16, DataType::kFloat16}) {
    for (int head_dim : {64, 40, 128, 256, 200}) {
      for (const Setting* setting : hopper_settings) {
        for (int i = 0; i < 6; i += 2) {  // the other three with the other dtype
          const int number = static_cast<int>(found.size()) + 1;
          const bool deterministic = __builtin_popcount(number) % 2 == 0;
          // On two multiprocessors alone there are several rounds of tiles, hence both directions.
          const int num_sms = number / 2 % 2 == 0 ? 2 : 0;
          const Shape shape = kHopperShapes[i + static_cast<int>(type)];
          found.push_back({setting, type, head_dim, shape, 0, deterministic, 0, num_sms});
        }
      }
    }
  }
  // What these do not reach, without a gradient of the scale: whole key tiles, of which few or
  // many share a head, and long rows. Walks that go around, dQ made inside the main kernel, steps
  // of 80 rows, a tile's keys shared out at head_dim 64, pairs of blocks. And the tiles between
  // the buckets 128 and 256, soft caps of pairs where nobody waits, and, with these problems in
  // both dtypes, where keys are shared out.
  const Setting &plain = kSettings[0], &causal = kSettings[1];
  const struct {
    const Setting& setting;
    int head_dim;
    Shape shape;
  } more[] = {
      {plain, 64, {130, 128, 2}},     {plain, 64, {260, 384, 4}},    {plain, 64, {200, 512, 2}},
      {plain, 64, {260, 4096, 2}},    {causal, 64, {260, 384, 4}},   {causal, 64, {1030, 200, 4}},
      {causal, 64, {5, 8200, 1}},     {plain, 128, {260, 384, 4}},   {plain, 128, {200, 512, 2}},
      {plain, 128, {200, 256, 1}},    {plain, 128, {1030, 128, 2}},  {plain, 128, {1030, 256, 4}},
      {plain, 128, {1030, 256, 2}},   {plain, 128, {1280, 8192, 4}}, {plain, 256, {1030, 128, 4}},
      {plain, 192, {260, 250, 4}},    {causal, 192, {260, 300, 4}},  {causal, 192, {16, 129, 2}},
      {kCapped, 256, {2060, 130, 2}}, {kCapped, 64, {5, 8200, 1}},   {kCapped, 128, {5, 4100, 1}},
      {kCapped, 256, {5, 4100, 1}},
  };
  for (DataType type : {DataType::kBFloat16, DataType::kFloat16}) {
    for (const auto& m : more) {
      const int num_sms = type == DataType::kBFloat16 ? 2 : 0;
      found.push_back({&m.setting, type, m.head_dim, m.shape, 0, false, 0, num_sms, false});
    }
  }
  return found;
}

// The one of this name; there must be one, and no other.
Case named(const std::vector<Case>& all, const std::string& name) {
  std::vector<Case> found;
  for (const Case& c : all) {
    if (c.name() == name) found.push_back(c);
  }
  if (found.empty()) {
    for (const Case& c : all) std::fprintf(stderr, "%s\n", c.name().c_str());
  }
  require(found.size() == 1, std::to_string(found.size()) + " problems are named " + name);
  return found.front();
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
  const std::string option = argc > 1 ? argv[1] : "";
  const bool by_part = option == "--part", by_name = option == "--only";
  const int wanted = by_part ? 4 : by_name ? 3 : 1;
  require(argc == wanted || ((by_part || by_name) && argc == wanted + 1),
          "usage: launch_test [--part I N [T] | --only NAME [T] | "
          "--plant memcheck|racecheck|synccheck]");
  const int times = argc > wanted ? std::atoi(argv[wanted]) : 1;
  require(times > 0, "T must be at least 1");
  Device device;
  cuda(query_device(0, &device), "query_device");
  std::vector<Case> all = cases(device);
  if (by_name) all = {named(all, argv[2])};
  const int part = by_part ? std::atoi(argv[2]) : 0, parts = by_part ? std::atoi(argv[3]) : 1;
  require(0 <= part && part < parts, "--part I N must have 0 <= I < N");
  int done = 0;
  for (size_t i = part; i < all.size(); i += parts, ++done) {
    std::printf("%s\n", all[i].name().c_str());  // what a tool says next is about it
    std::fflush(stdout);
    for (int t = 0; t < times; ++t) run(device, all[i]);
  }
  if (device.compute_capability == 90 && !by_name && !by_part) {
    require_all(forward_tiles, sm90::kForwardTileCount, "the forward");
    require_all(backward_tiles, sm90::kBackwardTileCount, "the backward");
  }
  std::printf("%d problems\nresults %016llx\n", done, static_cast<unsigned long long>(results));
}
