// Which keys a query row sees.
//
// Causal, prefix, window, chunk and length masks leave one interval of keys per row, and both of
// its ends rise with the row. That gives the block range of a tile and tells which blocks need a
// mask at all. Segment ids are no interval; they narrow the range and mask the blocks left. Where
// they are packed they are one, and Problem has it.
#pragma once

#include <cstdint>

#include "problem.h"

namespace flash2 {

__device__ __forceinline__ Interval meet(Interval a, Interval b) {
  return {max(a.begin, b.begin), min(a.end, b.end)};
}

__device__ __forceinline__ int floor_multiple(int value, int unit) {
  const int quotient = value / unit;
  return (quotient - (value % unit < 0 ? 1 : 0)) * unit;
}

// The structured masks of one batch entry.
struct Visibility {
  int offset;  // position of query row 0
  int prefix;
  int kv_length;

  Visibility() = default;
  __device__ __forceinline__ Visibility(const Problem& p, int batch) {
    int64_t position = p.query_offset;
    if (p.query_offset_operand.data) position += p.query_offset_operand.at(batch);
    constexpr int64_t kMax = kMaxPosition;
    offset = static_cast<int>(position < -kMax ? -kMax : position > kMax ? kMax : position);
    prefix = p.prefix_lengths.data ? p.prefix_lengths.at(batch) : 0;
    kv_length = p.seq_kv;
    if (p.key_value_seq_lengths.data) {
      kv_length = max(0, min(kv_length, p.key_value_seq_lengths.at(batch)));
    }
  }

  // The keys that query row `row` sees; empty where end <= begin.
  __device__ __forceinline__ Interval row(const Problem& p, int row) const {
    const int i = row + offset;
    Interval keys{0, kv_length};
    if (p.window_left != kUnbounded) keys.begin = max(0, i - p.window_left);
    if (p.window_right != kUnbounded) keys.end = min(keys.end, i + p.window_right + 1);
    if (p.is_causal) keys.end = min(keys.end, max(i + 1, prefix));
    if (p.chunk_size > 0) {
      const int first = floor_multiple(i, p.chunk_size);
      keys.begin = max(keys.begin, first);
      keys.end = min(keys.end, first + p.chunk_size);
    }
    return keys;
  }

  // The other way round: the query rows, of q_length, that see a key below kv_length. Both ends
  // rise with the key.
  __device__ __forceinline__ Interval column(const Problem& p, int key, int q_length) const {
    const int row = key - offset;  // that stands at the key
    Interval rows{0, q_length};
    if (p.window_left != kUnbounded) rows.end = min(rows.end, row + p.window_left + 1);
    if (p.window_right != kUnbounded) rows.begin = max(0, row - p.window_right);
    if (p.is_causal && key >= prefix) rows.begin = max(rows.begin, row);
    if (p.chunk_size > 0) {
      const int first = key / p.chunk_size * p.chunk_size - offset;
      rows.begin = max(rows.begin, first);
      rows.end = min(rows.end, first + p.chunk_size);
    }
    return rows;
  }
};

// The keys with the segment id of a query row, the rows with that of a key: where Problem has
// them.
__device__ __forceinline__ Interval segment_keys_of(const Problem& p, int batch, int row) {
  return p.row_keys[int64_t{batch} * p.seq_q + min(row, p.seq_q - 1)];
}
__device__ __forceinline__ Interval segment_rows_of(const Problem& p, int batch, int key) {
  return p.key_rows[int64_t{batch} * p.seq_kv + min(key, p.seq_kv - 1)];
}

// Whether kernels of the family have this call's work to do (Problem::packed). By whole warps.
template <int kFamily>
__device__ __forceinline__ bool has_work(const Problem& p) {
  if (p.packed == nullptr) return true;
  int packed = 1;
  for (int i = threadIdx.x % 32; i < p.packed_count; i += 32) packed &= p.packed[i];
  return (__all_sync(~0u, packed) != 0) == (kFamily == 90);
}

// Visibility::row with what all rows of a tile have in common computed once. A bound that the call
// lacks lies out of reach, so that only chunks take a branch. Row by row it would take more
// registers than the branches do, which the sm80 kernels lack.
struct RowBounds {
  static constexpr int kFar = 1 << 30;  // added to a position it is past all keys, and fits
  static_assert(kFar > 2 * kMaxPosition);

  int left, right;  // a row sees keys from position + left on, and below position + right,
  int diagonal;     // below the larger of position + diagonal
  int prefix;       // and prefix,
  int kv_length;    // and below it
  int offset;       // of positions, for chunks

  RowBounds() = default;
  __device__ __forceinline__ RowBounds(const Problem& p, const Visibility& visibility)
      : left(p.window_left != kUnbounded ? visibility.offset - p.window_left : -kFar),
        right(p.window_right != kUnbounded ? visibility.offset + p.window_right + 1 : kFar),
        diagonal(p.is_causal ? visibility.offset + 1 : kFar),
        prefix(visibility.prefix),
        kv_length(visibility.kv_length),
        offset(visibility.offset) {}

  // Of the query rows at the positions.
  template <int kRows>
  __device__ __forceinline__ void find(const Problem& p, const int (&positions)[kRows],
                                       int (&begin)[kRows], int (&end)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      begin[r] = max(positions[r] + left, 0);
      end[r] = min(positions[r] + right, max(positions[r] + diagonal, prefix));
      end[r] = min(end[r], kv_length);
    }
    if (p.chunk_size > 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int first = floor_multiple(positions[r] + offset, p.chunk_size);
        begin[r] = max(begin[r], first);
        end[r] = min(end[r], first + p.chunk_size);
      }
    }
  }
};

// The blocks of kTileKv keys that rows [first, last] need, in the order in which they are visited:
// first those that cut some row's interval, from the top down, then those that every row sees
// whole, likewise.
template <int kTileKv>
struct BlockRange {
  int upper;  // masked blocks above the whole ones
  int lower;  // masked blocks below them
  int total;
  int top;        // one past the uppermost block
  int whole_top;  // one past the uppermost whole block
  int whole_bottom;

  __device__ __forceinline__ BlockRange(const Problem& p, const Visibility& visibility, int first,
                                        int last)
      : BlockRange(visibility.row(p, first), visibility.row(p, last), first <= last) {}
  // Of what the first and the last of some rows see.
  __device__ __forceinline__ BlockRange(Interval a, Interval b, bool some_rows) {
    const int bottom = a.begin / kTileKv;
    top = (max(b.end, 0) + kTileKv - 1) / kTileKv;
    total = some_rows ? max(top - bottom, 0) : 0;
    whole_bottom = (b.begin + kTileKv - 1) / kTileKv;
    whole_top = max(a.end, 0) / kTileKv;
    const bool some_whole = whole_bottom < whole_top && total > 0;
    upper = some_whole ? top - whole_top : total;
    lower = some_whole ? whole_bottom - bottom : 0;
  }

  // Leaves only the blocks that hold keys of [keys.begin, keys.end), all of them masked.
  __device__ __forceinline__ void narrow(Interval keys) {
    const int bottom = max(top - total, keys.begin / kTileKv);
    top = min(top, (keys.end + kTileKv - 1) / kTileKv);
    upper = total = max(top - bottom, 0);
    lower = 0;
  }
  __device__ __forceinline__ int masked() const { return upper + lower; }
  __device__ __forceinline__ int block(int step) const {
    if (step < upper) return top - 1 - step;
    if (step < upper + lower) return whole_bottom - 1 - (step - upper);
    return whole_top - 1 - (step - upper - lower);
  }
};

}  // namespace flash2
