// Which tile of an expert kernel is whose: the tokens and rows of each, from the sorted slots.
#pragma once

#include "experts.h"
#include "hopper.cuh"
#include "route.cuh"

namespace moe_lab {

struct MatmulArguments {
  const void* x;           // the rows of tokens
  void* rows_of_slots;     // or null; see experts_rows.cuh
  int* rows_copied;        // of it
  const float* scales;     // of it, [slots], or null
  const int32_t* ids;      // few slots, not sorted yet; or null
  const int32_t* offsets;  // [E + 1]
  const int32_t* perm;     // [slots]
  const float* bias;       // of the rows, or null
  void* out;               // up: h; down: o
  int64_t slots;
  int slots_per_row;         // of x
  int E, rows, depth;        // rows: F or D; depth: D or F
  int row_tiles, row_group;  // tiles of the rows, and how many of them pass all tokens before the next ones
  int pieces, piece_depth;   // of the sum, in elements
  int tokens, stages, box;   // tokens of a tile at most; rows that one copy of tokens brings
  int together;              // steps whose weights are asked for at once, at most `stages`
  uint64_t policy;           // of the L2 cache for the weights
};

struct Tile {
  int expert, first, tokens, row_tile, piece;  // `first` of the sorted slots
};

// Tiles are numbered expert by expert; within one, `row_group` tiles of the rows take all its tokens before the next
// ones do, so that what runs at the same time shares both.
struct Schedule {
  const int* offsets;                   // [E + 1]
  const int* tiles_before;              // [E + 1], token tiles of the experts before
  int per_token_tile;                   // tiles of the rows, of all pieces
  int expert = -1, begin = 0, end = 0;  // of the tile before

  // Numbers must not decrease from call to call.
  __device__ __forceinline__ Tile at(int number, const MatmulArguments& a) {
    if (number >= end) {
      const int wanted = number / per_token_tile;
      int low = expert + 1, high = a.E - 1;  // the last with tiles_before[e] <= wanted
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (tiles_before[middle] <= wanted) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      expert = low;
      begin = tiles_before[low] * per_token_tile, end = tiles_before[low + 1] * per_token_tile;
    }
    const int inside = number - begin, parts = (end - begin) / per_token_tile;
    const int group = inside / (a.row_group * parts), in_group = inside - group * a.row_group * parts;
    const int wide = min(a.row_group, per_token_tile - group * a.row_group);
    const int token_tile = in_group / wide, row = group * a.row_group + in_group - token_tile * wide;
    const int from = offsets[expert], count = offsets[expert + 1] - from;
    const int each = ((count + parts - 1) / parts + 15) / 16 * 16;  // an expert's tokens are dealt evenly
    Tile tile;
    tile.expert = expert;
    tile.first = from + token_tile * each;
    tile.tokens = min(each, count - token_tile * each);
    tile.piece = row / a.row_tiles;
    tile.row_tile = row - tile.piece * a.row_tiles;
    return tile;
  }
};

// What a block keeps of the routing, in shared memory in this order.
struct Tables {
  int* warp_sums;     // [32]
  int* offsets;       // [E + 1]
  int* tiles_before;  // [E + 1]
  int* perm;          // [slots], where the block sorts

  static constexpr int kBytesOfCounts = kFewSlots / 32 * kMaxExperts;

  static constexpr int bytes(int E, int64_t few_slots) { return (32 + 2 * (E + 1) + static_cast<int>(few_slots)) * 4; }

  __device__ Tables(int* at, const MatmulArguments& a)
      : warp_sums(at), offsets(at + 32), tiles_before(offsets + a.E + 1), perm(tiles_before + a.E + 1) {}

  // The same as `fill`, of slots that the lanes of a warp hold.
  template <int THREADS>
  __device__ __forceinline__ void fill_from_a_warp(const MatmulArguments& a) {
    const int lane = threadIdx.x % 32, slots = static_cast<int>(a.slots);
    const int id = lane < slots ? __ldcg(a.ids + lane) : -1;
    const bool used = 0 <= id && id < a.E;
    const uint32_t same = __match_any_sync(kAll, id), before = (1u << lane) - 1;
    const bool leads = used && (same & before) == 0;
    const int its = leads ? (__popc(same) + a.tokens - 1) / a.tokens : 0;
    for (int start = 0; start <= a.E; start += THREADS) {
      const int e = start + threadIdx.x;
      int slots_before = 0, token_tiles = 0;
      for (int i = 0; i < slots; ++i) {
        const int other = __shfl_sync(kAll, used ? id : a.E, i), other_tiles = __shfl_sync(kAll, its, i);
        slots_before += other < e, token_tiles += other < e ? other_tiles : 0;
      }
      if (e <= a.E) offsets[e] = slots_before, tiles_before[e] = token_tiles;
    }
    __syncthreads();
    if (threadIdx.x < 32 && used) perm[offsets[id] + __popc(same & before)] = lane;
    __syncthreads();
  }

  // By all THREADS of the block, which are in step after it. SORTS: the block may sort, by way of `counts`: for each 32
  // slots, how many of them are each expert's.
  template <int THREADS, bool SORTS>
  __device__ __forceinline__ void fill(const MatmulArguments& a, uint8_t* counts) {
    constexpr int kWarps = THREADS / 32, kMost = SORTS ? (kFewSlots / 32 + kWarps - 1) / kWarps : 1;
    const bool sorts = SORTS && a.ids != nullptr;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slots = static_cast<int>(a.slots);
    if (sorts && slots <= 32) return fill_from_a_warp<THREADS>(a);
    const int chunks = (slots + 31) / 32;
    int ids[kMost], earlier[kMost];  // of slot 32 (warp + i kWarps) + lane; -1 if it is unused
    if (sorts) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const int slot = 32 * (warp + i * kWarps) + lane;
        ids[i] = slot < slots ? __ldcg(a.ids + slot) : -1;
      }
      for (int i = threadIdx.x; i < (chunks * a.E + 3) / 4; i += THREADS) reinterpret_cast<uint32_t*>(counts)[i] = 0;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (ids[i] >= a.E) ids[i] = -1;
        const uint32_t same = __match_any_sync(kAll, ids[i]);
        earlier[i] = __popc(same & ((1u << lane) - 1));
        if (ids[i] >= 0 && earlier[i] == 0) counts[(warp + i * kWarps) * a.E + ids[i]] = __popc(same);
      }
      __syncthreads();
    }
    int tiles_carry = 0, slots_carry = 0;
    for (int start = 0; start <= a.E; start += THREADS) {
      const int e = start + threadIdx.x;
      int count = 0;
      if (sorts && e < a.E) {
        for (int c = 0; c < chunks; ++c) count += counts[c * a.E + e];
      } else if (e < a.E) {
        count = __ldcg(a.offsets + e + 1) - __ldcg(a.offsets + e);
      }
      const int its = (count + a.tokens - 1) / a.tokens;
      int tiles_up_to = its, slots_up_to = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int tiles_other = __shfl_up_sync(kAll, tiles_up_to, step);
        const int slots_other = __shfl_up_sync(kAll, slots_up_to, step);
        tiles_up_to += lane >= step ? tiles_other : 0;
        slots_up_to += lane >= step ? slots_other : 0;
      }
      if (lane == 31) warp_sums[warp] = tiles_up_to, warp_sums[16 + warp] = slots_up_to;
      __syncthreads();
      int tiles = tiles_carry + tiles_up_to - its, before = slots_carry + slots_up_to - count;
      for (int w = 0; w < THREADS / 32; ++w) {
        tiles += w < warp ? warp_sums[w] : 0, before += w < warp ? warp_sums[16 + w] : 0;
        tiles_carry += warp_sums[w], slots_carry += warp_sums[16 + w];
      }
      if (e <= a.E) offsets[e] = before, tiles_before[e] = tiles;
      __syncthreads();
    }
    if (sorts) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (ids[i] < 0) continue;
        for (int c = 0; c < warp + i * kWarps; ++c) earlier[i] += counts[c * a.E + ids[i]];
        perm[offsets[ids[i]] + earlier[i]] = 32 * (warp + i * kWarps) + lane;
      }
      fence_for_async();  // tiles are copied to where the counts stood
      __syncthreads();
    }
  }
};

}  // namespace moe_lab
