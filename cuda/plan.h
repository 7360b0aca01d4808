// From a problem and the facts of a device to the kernel that runs: a pure host function.
//
// plan.cc needs neither CUDA nor a GPU, so that its choices can be tested anywhere; launch.cc is
// the only host file that talks to the CUDA runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "problem.h"

struct CUstream_st;

namespace flash2 {

struct Device {
  int32_t compute_capability = 0;  // 10 * major + minor: 80, 86, 89, 90, ...
  int32_t num_sms = 0;
  int32_t smem_per_block = 0;  // largest opt-in, in bytes: 232448 on H100, 101376 on 8.6 and 8.9
  int32_t smem_per_sm = 0;     // 233472 on H100, 102400 on 8.6 and 8.9
};

enum class PlanStatus : int32_t {
  kOk = 0,
  kDeviceTooOld,      // compute capability below 8.0
  kHeadDim,           // head_dim or head_dim_v not a multiple of 8 in [8, 256]
  kHeads,             // heads_kv does not divide heads_q
  kTooLong,           // a length, offset or window beyond kMaxPosition
  kTooManyTiles,      // more than 2^31 - 1 tiles
  kSegmentIds,        // only one of the two given
  kNegativeArgument,  // a negative size, chunk size or soft cap
  kAlignment,         // a pointer or a stride that is no multiple of 16 bytes
};

// One sentence without values; the caller, who holds them, adds the values.
const char* describe(PlanStatus status);

// Where packed segments as intervals lie in a workspace, in bytes; of rows and of keys.
struct SegmentWorkspace {
  // Of the kernel that makes them, per batch entry; each says if they are packed.
  int32_t blocks = 0;
  int64_t packed = 0;
  int64_t row_keys = 0;
  int64_t key_rows = 0;
  int64_t bytes = 0;
};

inline constexpr int64_t kSegmentRows = 1024;  // and keys, of such a block

SegmentWorkspace segment_workspace(int64_t batch, int64_t seq_q, int64_t seq_kv);

struct ForwardPlan {
  PlanStatus status = PlanStatus::kOk;
  bool empty = false;    // nothing to write: no launch
  int32_t family = 80;   // kernels of sm80/ or sm90/
  int32_t head_dim = 0;  // the bucket: 64, 128 or 256
  int32_t variant = 0;   // index into the family's tile table
  bool general = false;  // the kernel with soft cap, ALiBi and segment ids
  int32_t tile_q = 0;
  int32_t tile_kv = 0;
  int32_t stages = 0;   // K/V pairs in shared memory
  int32_t pack = 1;     // query heads of a group in one tile, a power of two: position by position
  int32_t packs = 0;    // such packs of all heads of a batch entry
  int32_t splits = 1;   // blocks among which the keys of a tile are shared out
  int32_t cluster = 1;  // blocks of a cluster: these, or those that share what they load
  int32_t tiles_q = 0;  // query tiles per pack
  int32_t section = 1;  // packs that share the L2 cache: scheduler.cuh
  int32_t last_section = INT32_MAX;  // the pack from which on all the rest are one section
  uint32_t grid = 0;                 // blocks, in x alone
  uint32_t block = 0;                // threads
  uint32_t smem_bytes = 0;
  size_t workspace_bytes = 0;
  // What runs after it, and does the work, where segment ids turn out not to be packed: none or
  // one.
  std::vector<ForwardPlan> otherwise;
};

// What any plan's workspace needs at most, so that it can be sized when a call is traced.
int64_t forward_workspace_bytes(int64_t batch, int64_t seq_q, int64_t seq_kv, bool segments);

// `family` 80 asks for the kernels of sm80/; 0 takes the fastest that serve the problem.
ForwardPlan plan_forward(const Device& device, const ForwardProblem& problem, int32_t family = 0);

// Packs of at most `pack` query heads of one key head, per batch entry.
int32_t packs_of_heads(const Problem& problem, int32_t pack);
// Tiles of `tile_q` rows that such a pack makes.
int64_t tiles_of_pack(const Problem& problem, int32_t pack, int32_t tile_q);

// Where the parts of the backward's workspace begin, in bytes. It depends on shapes and options
// alone, so that it can be sized when a call is traced, before any GPU is known. Rows are the
// query rows of all batch entries and heads, those of each (entry, head) padded:
// per row 4 * head_dim + 8 bytes, and 4 more per 16 rows.
struct BackwardWorkspace {
  int64_t rows_per_head = 0;
  int64_t dquery = 0;    // sums of dS K, float32, head_dim each row; order: backward_rows.cuh
  int64_t lse2 = 0;      // logsumexps as the main kernel takes them
  int64_t delta = 0;     // row sums of dO * O, less the logsumexp's cotangent, likewise
  int64_t turns = 0;     // int32 per 16 rows: whose turn it is to add to them
  int64_t finished = 0;  // int32 per head: key tiles that are done
  int64_t ticket = 0;    // int32: key tiles taken so far; query tiles whose dQ is being made
  int64_t segments = 0;  // a SegmentWorkspace, where there are segment ids
  int64_t bytes = 0;
};

inline constexpr int64_t kRowPadding = 64;  // rows of a block of the kernels before and after
// Every tile_q divides it; that of 80 rows serves only walks that are long enough for its padding,
// at head_dim 128.
inline constexpr int64_t kHeadPadding = 128, kLongHeadPadding = 320, kLongRows = 1024;

BackwardWorkspace backward_workspace(int64_t batch, int64_t heads_q, int64_t seq_q,
                                     int64_t head_dim, int64_t seq_kv, bool segments);

struct BackwardPlan {
  PlanStatus status = PlanStatus::kOk;
  int32_t family = 80;
  int32_t head_dim = 0;  // the bucket
  int32_t variant = 0;
  bool general = false;
  int32_t tile_q = 0;
  int32_t tile_kv = 0;
  int32_t stages = 0;          // pairs of Q and dO in shared memory
  int32_t tiles_kv = 0;        // key tiles per head
  int32_t section = 1;         // as in the forward, of key heads
  int32_t round = INT32_MAX;   // sm90: key tiles at work at once, where the order of walks turns
  bool sections_turn = false;  // sm90: a section is one round, and walks turn from one to the next
  uint32_t grid = 0;           // blocks of the main kernel; 0: no keys
  uint32_t block = 0;          // its threads
  uint32_t smem_bytes = 0;     // its shared memory
  uint32_t rows_grid = 0;      // blocks of the kernels before and after it; 0: no queries
  bool first_stores = false;   // BackwardParams
  bool transposed_sums = false;
  bool finish_inside = false;  // no kernel after it: the main kernel makes dQ from its sums
  BackwardWorkspace workspace;
  std::vector<BackwardPlan> otherwise;  // as in the forward, of the main kernel
};

// `family` 80 asks for the kernels of sm80/; 0 takes the fastest that serve the problem.
BackwardPlan plan_backward(const Device& device, const BackwardProblem& problem,
                           int32_t family = 0);

// The rules that every pass has: what is wrong with a problem, and with an array of its own.
PlanStatus check_problem(const Device& device, const Problem& problem);
bool is_aligned(const void* pointer, const Strides& stride, int64_t batch, int64_t rows,
                int64_t heads);

// The choices that every pass makes alike: the bucket of head_dim, and whether only a general
// kernel serves the problem.
int32_t bucket(const Problem& problem);
bool is_general(const Problem& problem);
// Whether it does because scores are bent, and not for segment ids alone.
bool bends_scores(const Problem& problem);
// Whether a head's last query tiles and first key tiles take longest: only then is it worth
// walking several heads at once.
bool is_uneven(const Problem& problem);
// How many of `heads` then, where all tiles of a head read the same `bytes`.
int32_t heads_in_cache(int64_t bytes, int64_t heads);

// Facts of a device, asked for once per ordinal. Returns a cudaError_t.
int query_device(int ordinal, Device* device);

// Enqueues the planned kernel on the current device; neither allocates nor synchronises, and may
// be captured into a graph. `workspace` holds plan.workspace_bytes, or is null where that is 0.
// Returns a cudaError_t.
int launch_forward(const ForwardProblem& problem, const ForwardPlan& plan, void* workspace,
                   CUstream_st* stream);

// Likewise; `workspace` holds plan.workspace.bytes.
int launch_backward(const BackwardProblem& problem, const BackwardPlan& plan, void* workspace,
                    CUstream_st* stream);

}  // namespace flash2
