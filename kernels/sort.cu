// The kernels that sort slots already routed.
#include <algorithm>

#include "cuda.h"
#include "sort.cuh"

namespace moe_lab {
namespace {

template <bool UNUSED>
__device__ __forceinline__ uint32_t expert_of(int32_t id, int E) {
  return UNUSED ? min(static_cast<uint32_t>(id), static_cast<uint32_t>(E)) : id;
}

template <bool UNUSED>
__device__ __forceinline__ void load_ids(Sorter<UNUSED>& sorter, const int32_t* __restrict__ ids, int E) {
#pragma unroll 8
  for (int i = threadIdx.x; i < sorter.slots; i += kSortThreads)
    sorter.ids[i] = static_cast<uint16_t>(expert_of<UNUSED>(ids[i], E));
}

// Some more: sorts what a launch before has routed, in one block or cluster.
template <bool UNUSED>
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const int32_t* ids, const __grid_constant__ SortArguments s,
                                                            int E, int64_t all_slots, int slots_per_block) {
  extern __shared__ int sort_shared[];
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * slots_per_block;
  const int64_t slots = min(static_cast<int64_t>(slots_per_block), all_slots - first_slot);
  Sorter<UNUSED> sorter(sort_shared, E, static_cast<int>(max(slots, static_cast<int64_t>(0))));
  wait_for_kernels_before();
  load_ids(sorter, ids + first_slot, E);
  sort_in_cluster(sorter, s, first_slot);
}

// Many: two launches, of which the first counts the slots of each block.
template <bool UNUSED>
__global__ void __launch_bounds__(kSortThreads)
    count_kernel(const int32_t* ids, const __grid_constant__ SortArguments s, int E, int64_t all_slots,
                 int slots_per_block) {
  extern __shared__ int sort_shared[];
  const int all = Sorter<UNUSED>::all(E);
  for (int e = threadIdx.x; e < all; e += kSortThreads) sort_shared[e] = 0;
  __syncthreads();
  wait_for_kernels_before();
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * slots_per_block;
  const int slots = static_cast<int>(min(static_cast<int64_t>(slots_per_block), all_slots - first_slot));
  for (int i = threadIdx.x; i < slots; i += kSortThreads)
    atomicAdd(&sort_shared[expert_of<UNUSED>(ids[first_slot + i], E)], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < all; e += kSortThreads) s.block_counts[blockIdx.x * all + e] = sort_shared[e];
}

template <bool UNUSED>
__global__ void __launch_bounds__(kSortThreads, 2)
    place_kernel(const int32_t* ids, const __grid_constant__ SortArguments s, int experts, int64_t all_slots,
                 int slots_per_block) {
  extern __shared__ int sort_shared[];
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * slots_per_block;
  Sorter<UNUSED> sorter(sort_shared, experts,
                        static_cast<int>(min(static_cast<int64_t>(slots_per_block), all_slots - first_slot)));
  constexpr int kMaxShare = Sorter<UNUSED>::kMaxShare;
  const int E = sorter.E;
  for (int e = threadIdx.x; e < E; e += kSortThreads) sorter.base[e] = sorter.counts[e] = 0;
  wait_for_kernels_before();
  load_ids(sorter, ids + first_slot, experts);
  // Each thread sums some blocks' counts of one expert, and their sums meet in `base` and `counts`: sums of integers do
  // not depend on their order.
  __syncthreads();
  const int parts = max(1, kSortThreads / E);
  for (int i = threadIdx.x; i < parts * E; i += kSortThreads) {
    const int e = i % E, part = i / E;
    int before = 0, total = 0;
#pragma unroll 16
    for (int turn = part; turn < gridDim.x; turn += parts) {
      // Each block begins elsewhere: else all would wait for the same line of the cache.
      const int block = turn + blockIdx.x < gridDim.x ? turn + blockIdx.x : turn + blockIdx.x - gridDim.x;
      const int its = s.block_counts[block * E + e];
      total += its;
      before += block < blockIdx.x ? its : 0;
    }
    atomicAdd(&sorter.counts[e], total);
    atomicAdd(&sorter.base[e], before);
  }
  __syncthreads();
  int before[kMaxShare] = {}, total[kMaxShare] = {};
#pragma unroll
  for (int i = 0; i < kMaxShare; ++i) {
    const int e = threadIdx.x + i * kSortThreads;
    if (e < E) before[i] = sorter.base[e], total[i] = sorter.counts[e];
  }
  __syncthreads();
  sorter.count();
  sorter.place_experts(s, before, total);
  sorter.place_slots(s, first_slot);
}

template <bool UNUSED>
cudaError_t sort(const int32_t* ids, const SortArguments& s, int E, int64_t slots, const Device& device) {
  constexpr int kFew = 512, kMany = 4096;  // slots of a block of the single launch
  const int64_t few = std::clamp<int64_t>(ceil_div(slots, kFew), 1, device.cluster);
  if (slots <= few * kMany) {
    const int each = static_cast<int>(ceil_div(slots, few));
    const Launch how{few, kSortThreads, Sorter<UNUSED>::bytes(E, each), static_cast<int>(few)};
    return launch(sort_kernel<UNUSED>, how, device, ids, s, E, slots, each);
  }
  const int each = static_cast<int>(ceil_div(slots, sort_blocks(slots, device)));
  const int64_t blocks = ceil_div(slots, each);
  const Launch count{blocks, kSortThreads, Sorter<UNUSED>::all(E) * sizeof(int)};
  const cudaError_t error = launch(count_kernel<UNUSED>, count, device, ids, s, E, slots, each);
  if (error != cudaSuccess) return error;
  const Launch place{blocks, kSortThreads, Sorter<UNUSED>::bytes(E, each)};
  return launch(place_kernel<UNUSED>, place, device, ids, s, E, slots, each);
}

}  // namespace

int64_t sort_blocks(int64_t slots, const Device& device) {
  constexpr int kMost = 8192;  // slots of a block, beside what 1024 experts take of an A100's shared memory
  return std::max<int64_t>(device.multiprocessors, ceil_div(slots, kMost));
}

cudaError_t sort_slots(const int32_t* ids, const SortArguments& s, int E, int64_t slots, const Device& device,
                       bool unused) {
  return unused ? sort<true>(ids, s, E, slots, device) : sort<false>(ids, s, E, slots, device);
}

}  // namespace moe_lab
