// Rows of x in the order of the sorted slots, so that tiles of them can be copied at once.
//
// The kernel that multiplies them makes them meanwhile: three warps of each block have nothing else to do. Whoever
// comes first takes the next rows, so a block that has not begun holds nobody up.
#pragma once

#include "experts_schedule.cuh"
#include "hopper.cuh"

namespace moe_lab {

constexpr int kRowsAtOnce = 4;
static_assert(kRowsOfCount % kRowsAtOnce == 0);

template <class T>
__device__ __forceinline__ uint4 scaled(uint4 eight, float scale) {
  T* const values = reinterpret_cast<T*>(&eight);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = static_cast<T>(static_cast<float>(values[i]) * scale);
  return eight;
}

// By whole warps; `used` slots come first. Nothing is read twice, so past the L1 cache.
template <class T>
__device__ __forceinline__ void copy_rows(const MatmulArguments& a, int used) {
  constexpr int kInFlight = 8;
  const int lane = threadIdx.x % 32, of_row = a.depth / 8;
  for (;;) {
    int first = 0;
    if (lane == 0) first = atomicAdd(a.rows_copied + counts_of_rows(a.slots) - 1, kRowsAtOnce);
    first = __shfl_sync(kAll, first, 0);
    if (first >= used) return;
    const int end = min(first + kRowsAtOnce, used);
    for (int n = first; n < end; ++n) {
      const int slot = __ldcg(a.perm + n);
      const uint4* const from = static_cast<const uint4*>(a.x) + static_cast<int64_t>(slot / a.slots_per_row) * of_row;
      uint4* const to = static_cast<uint4*>(a.rows_of_slots) + static_cast<int64_t>(n) * of_row;
      for (int at = lane; at < of_row; at += 32 * kInFlight) {
        uint4 eight[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (at + 32 * i < of_row) eight[i] = __ldcg(from + at + 32 * i);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (at + 32 * i < of_row) {
            to[at + 32 * i] = a.scales == nullptr ? eight[i] : scaled<T>(eight[i], __ldcg(a.scales + slot));
          }
        }
      }
    }
    fence_global_for_async();
    __syncwarp();
    if (lane == 0) add_release(a.rows_copied + first / kRowsOfCount, end - first);
  }
}

// By the thread that then copies the tile.
__device__ __forceinline__ void wait_for_rows(const MatmulArguments& a, const Tile& tile, int used) {
  for (int at = tile.first / kRowsOfCount; at * kRowsOfCount < tile.first + tile.tokens; ++at) {
    const int rows = min(kRowsOfCount, used - at * kRowsOfCount);
    while (load_acquire(a.rows_copied + at) < rows) {
    }
  }
  fence_global_for_async();
}

}  // namespace moe_lab
