// Slots sorted by expert, by counting: a slot's place is the place of its expert, plus how many of that expert's slots
// stand in the blocks before, in the warps before, and before it in its warp. No atomic decides an order.
//
// With UNUSED an id outside [0, E) is an unused slot; these are sorted as those of one more expert, which is the last.
#pragma once

#include <cooperative_groups.h>

#include "cuda.h"
#include "route.cuh"

namespace moe_lab {

constexpr int kSortThreads = 512;
constexpr int kSortWarps = kSortThreads / 32;

// What a block needs, in shared memory in this order.
template <bool UNUSED>
struct Sorter {
  static constexpr int kMaxShare = (kMaxExperts + UNUSED + kSortThreads - 1) / kSortThreads;  // experts of a thread
  const int E, slots;  // E with the one of the unused slots
  int* counts;         // [E], of this block; those of a cluster read each other's
  int* base;           // [E], the sorted position of the block's first slot of each expert
  int* warp_sums;      // [32]
  int* started;        // [warps, E], how many of an expert's slots of the block stand in the warps before
  uint32_t* holders;   // [warps, E], the lanes of a round that hold a slot of the expert; zero between rounds
  uint16_t* ids;       // [slots]

  static constexpr int all(int experts) { return experts + UNUSED; }
  static constexpr size_t bytes(int experts, int64_t slots) {
    const int E = all(experts);
    return ((2 + 2 * kSortWarps) * E + 32) * sizeof(int) + (slots + 1) / 2 * 2 * sizeof(uint16_t);
  }

  __device__ Sorter(int* shared, int experts, int slots)
      : E(all(experts)), slots(slots), counts(shared), base(shared + E), warp_sums(shared + 2 * E),
        started(warp_sums + 32), holders(reinterpret_cast<uint32_t*>(started + kSortWarps * E)),
        ids(reinterpret_cast<uint16_t*>(holders + kSortWarps * E)) {}

  // Slots of a warp: whole rounds, so that a round's lanes are neighbours.
  __device__ int share() const { return (slots + kSortThreads - 1) / kSortThreads * 32; }
  __device__ int warps() const { return (slots + share() - 1) / max(share(), 1); }

  // `ids` are set; fills `started` and `counts`.
  __device__ void count() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = warp * share(),
              end = min(begin + share(), slots);
    for (int i = threadIdx.x; i < warps() * E; i += kSortThreads) started[i] = holders[i] = 0;
    __syncthreads();
    for (int slot = begin + lane; slot < end; slot += 32) atomicAdd(&started[warp * E + ids[slot]], 1);
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += kSortThreads) {
      int before = 0;
      for (int w = 0; w < warps(); ++w) {
        const int its = started[w * E + e];
        started[w * E + e] = before;
        before += its;
      }
      counts[e] = before;
    }
  }

  // For each expert of a thread: its slots in the blocks before, and in all. Fills `base`; block 0 writes the counts.
  __device__ void place_experts(const SortArguments& s, const int (&before)[kMaxShare], const int (&total)[kMaxShare]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int carry = 0;
#pragma unroll
    for (int i = 0; i < kMaxShare; ++i) {
      if (i * kSortThreads >= E) break;
      const int e = threadIdx.x + i * kSortThreads, its = e < E ? total[i] : 0;
      int up_to = its;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAll, up_to, step);
        up_to += lane >= step ? other : 0;
      }
      if (lane == 31) warp_sums[warp] = up_to;
      __syncthreads();
      int warps_before = carry;
      for (int w = 0; w < warp; ++w) warps_before += warp_sums[w];
      const int offset = warps_before + up_to - its;
      if (e < E) {
        base[e] = offset + before[i];
        if (blockIdx.x == 0) {
          s.offsets[e] = offset;
          if (!UNUSED || e < E - 1) s.counts[e] = its;
          if (!UNUSED && e == E - 1) s.offsets[E] = offset + its;
        }
      }
      for (int w = 0; w < kSortWarps && i + 1 < kMaxShare; ++w) carry += warp_sums[w];
      __syncthreads();
    }
  }

  __device__ void place_slots(const SortArguments& s, int64_t first_slot) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = warp * share(),
              end = min(begin + share(), slots);
    // What lanes share an expert is told by bits in memory; __match_any_sync takes as long.
    for (int slot = begin + lane; slot - lane < end; slot += 32) {
      const bool live = slot < end;
      const int at = live ? warp * E + ids[slot] : 0;
      if (live) atomicOr(&holders[at], 1u << lane);
      __syncwarp();
      const uint32_t same = live ? holders[at] : 0;
      const int rank = __popc(same & ((1u << lane) - 1)), earlier = live ? started[at] : 0;
      __syncwarp();
      if (live) {
        if (rank == 0) started[at] = earlier + __popc(same), holders[at] = 0;
        const int position = base[at - warp * E] + earlier + rank;
        s.perm[position] = static_cast<int>(first_slot + slot);
        s.inverse[first_slot + slot] = position;
      }
      __syncwarp();
    }
  }
};

// Sorts the slots of the block, or of the cluster that is the whole grid.
template <bool UNUSED>
__device__ __forceinline__ void sort_in_cluster(Sorter<UNUSED>& sorter, const SortArguments& s, int64_t first_slot) {
  constexpr int kMaxShare = Sorter<UNUSED>::kMaxShare;
  __syncthreads();
  sorter.count();
  int before[kMaxShare] = {}, total[kMaxShare] = {};
#if __CUDA_ARCH__ >= 900
  if (gridDim.x > 1) cooperative_groups::this_cluster().sync();
#endif
#pragma unroll
  for (int i = 0; i < kMaxShare; ++i) {
    const int e = threadIdx.x + i * kSortThreads;
    if (e >= sorter.E) break;
#if __CUDA_ARCH__ >= 900
    for (int i_block = 0; i_block < gridDim.x; ++i_block) {
      const int block = (i_block + blockIdx.x) % gridDim.x;  // else all would read the same one's at the same time
      const int its = gridDim.x == 1 ? sorter.counts[e]
                                     : cooperative_groups::this_cluster().map_shared_rank(sorter.counts, block)[e];
      total[i] += its;
      before[i] += block < blockIdx.x ? its : 0;
    }
#else
    total[i] = sorter.counts[e];
#endif
  }
#if __CUDA_ARCH__ >= 900
  if (gridDim.x > 1) cooperative_groups::this_cluster().sync();  // none leaves while its counts are read
#endif
  sorter.place_experts(s, before, total);
  sorter.place_slots(s, first_slot);
}

}  // namespace moe_lab
