// Where segment ids are packed, the keys that a row sees by them are an interval whose ends rise
// with the row, as those of every other mask (mask.cuh). This kernel finds these intervals, and
// whether ids are packed.
//
// Ids are packed if they do not fall from one place to the next, but for one turn at most, behind
// which all lie below the first: 1 1 2 2 3 0 0, as padding is written, before or behind. Then an
// id's places are neighbours, and two searches find them. That both ends rise, also of rows whose
// id no key has, is looked at; where they do not, as with ids of query and key in another order,
// ids do not count as packed.
#include <cuda_runtime_api.h>

#include <cstdint>

#include "plan.h"
#include "problem.h"
#include "segment_intervals.h"

namespace flash2 {
namespace {

constexpr int kSegmentThreads = static_cast<int>(kSegmentRows);

struct SegmentParams {
  PerBatch<int32_t> query_ids;
  PerBatch<int32_t> key_ids;
  int32_t seq_q;
  int32_t seq_kv;
  int32_t blocks;  // per batch entry
  Interval* row_keys;
  Interval* key_rows;
  int32_t* packed;  // one of each block
  bool alike;       // the ids of queries are those of keys: so are the intervals
};

struct Ids {
  const int32_t* ids;
  int length;
  int turn;  // the second part's first; the length if there is none
  bool packed;

  // By all threads of the block. `turns` is shared: the number of turns and the place of the
  // first.
  __device__ Ids(const int32_t* row, int size, int* turns) : ids(row), length(size) {
    if (threadIdx.x == 0) turns[0] = 0, turns[1] = size;
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x + 1; i < length; i += kSegmentThreads) {
      if (ids[i] < ids[i - 1]) {
        atomicAdd(&turns[0], 1);
        atomicMin(&turns[1], i);
      }
    }
    __syncthreads();
    turn = turns[1];
    packed = turns[0] == 0 || (turns[0] == 1 && ids[length - 1] < ids[0]);
  }

  // The first place of [begin, end) whose id is at least, or past, this one; `end` if none is.
  __device__ int search(int begin, int end, int id, bool past) const {
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (ids[middle] < id || (past && ids[middle] == id)) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
  // The places of an id. Of one that is not there: none, where it would stand; `behind` says in
  // which part, where it could be in either.
  __device__ Interval find(int id, bool behind) const {
    const bool second = id < ids[0];
    if (second && turn == length && !behind) return {0, 0};
    const int begin = second ? turn : 0, end = second ? length : turn;
    return {search(begin, end, id, false), search(begin, end, id, true)};
  }
  // What the place `at` of `others` sees of these.
  __device__ Interval seen_from(const Ids& others, int at) const {
    return find(others.ids[at], at >= others.turn);
  }
};

// Writes what one place of `others` sees of `these`. Whether both ends rise to the next place.
__device__ bool write(const Ids& others, const Ids& these, int at, Interval* to) {
  if (at >= others.length) return true;
  const Interval seen = these.seen_from(others, at);
  to[at] = seen;
  if (at + 1 == others.length || others.ids[at + 1] == others.ids[at]) return true;
  const Interval next = these.seen_from(others, at + 1);
  return seen.begin <= next.begin && seen.end <= next.end;
}

__global__ void __launch_bounds__(kSegmentThreads)
    segment_intervals(const __grid_constant__ SegmentParams p) {
  __shared__ int turns[2][2];
  const int batch = blockIdx.x / p.blocks;
  const int at = static_cast<int>(blockIdx.x % p.blocks) * kSegmentThreads + threadIdx.x;
  const Ids queries(p.query_ids.row(batch), p.seq_q, turns[0]);
  bool good = queries.packed;
  if (p.alike) {
    good &= write(queries, queries, at, p.row_keys + int64_t{batch} * p.seq_q);
  } else {
    const Ids keys(p.key_ids.row(batch), p.seq_kv, turns[1]);
    good &= keys.packed;
    good &= write(queries, keys, at, p.row_keys + int64_t{batch} * p.seq_q);
    good &= write(keys, queries, at, p.key_rows + int64_t{batch} * p.seq_kv);
  }
  const int packed = __syncthreads_and(good);
  if (threadIdx.x == 0) p.packed[blockIdx.x] = packed;
}

}  // namespace

int find_segment_intervals(Problem* problem, void* workspace, CUstream_st* stream) {
  Problem& p = *problem;
  const SegmentWorkspace w = segment_workspace(p.batch, p.seq_q, p.seq_kv);
  char* base = static_cast<char*>(workspace);
  const PerBatch<int32_t>& query_ids = p.query_segment_ids;
  const PerBatch<int32_t>& key_ids = p.key_value_segment_ids;
  const bool alike =
      query_ids.data == key_ids.data && query_ids.stride == key_ids.stride && p.seq_q == p.seq_kv;
  SegmentParams params{query_ids,
                       key_ids,
                       p.seq_q,
                       p.seq_kv,
                       w.blocks,
                       reinterpret_cast<Interval*>(base + w.row_keys),
                       reinterpret_cast<Interval*>(base + (alike ? w.row_keys : w.key_rows)),
                       reinterpret_cast<int32_t*>(base + w.packed),
                       alike};
  p.row_keys = params.row_keys;
  p.key_rows = params.key_rows;
  p.packed = params.packed;
  p.packed_count = w.blocks * p.batch;
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&segment_intervals), dim3(p.packed_count),
                          dim3(kSegmentThreads), arguments, 0, stream);
}

}  // namespace flash2
