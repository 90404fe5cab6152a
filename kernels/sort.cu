// The kernels that sort slots already routed.
#include <algorithm>

#include "cuda.h"
#include "sort.cuh"

namespace moe_lab {
namespace {

__device__ __forceinline__ void load_ids(Sorter& sorter, const int32_t* __restrict__ ids) {
#pragma unroll 8
  for (int i = threadIdx.x; i < sorter.slots; i += kSortThreads) sorter.ids[i] = static_cast<uint16_t>(ids[i]);
}

// Some more: sorts what a launch before has routed, in one block or cluster.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const int32_t* ids, const __grid_constant__ SortArguments s,
                                                            int E, int64_t all_slots, int slots_per_block) {
  extern __shared__ int sort_shared[];
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * slots_per_block;
  Sorter sorter(sort_shared, E,
                static_cast<int>(
                    max(min(static_cast<int64_t>(slots_per_block), all_slots - first_slot), static_cast<int64_t>(0))));
  wait_for_kernels_before();
  load_ids(sorter, ids + first_slot);
  sort_in_cluster(sorter, s, first_slot);
}

// Many: two launches, of which the first counts the slots of each block.
__global__ void __launch_bounds__(kSortThreads)
    count_kernel(const int32_t* ids, const __grid_constant__ SortArguments s, int E, int64_t all_slots,
                 int slots_per_block) {
  extern __shared__ int sort_shared[];
  for (int e = threadIdx.x; e < E; e += kSortThreads) sort_shared[e] = 0;
  __syncthreads();
  wait_for_kernels_before();
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * slots_per_block;
  const int slots = static_cast<int>(min(static_cast<int64_t>(slots_per_block), all_slots - first_slot));
  for (int i = threadIdx.x; i < slots; i += kSortThreads) atomicAdd(&sort_shared[ids[first_slot + i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kSortThreads) s.block_counts[blockIdx.x * E + e] = sort_shared[e];
}

__global__ void __launch_bounds__(kSortThreads)
    place_kernel(const int32_t* ids, const __grid_constant__ SortArguments s, int E, int64_t all_slots,
                 int slots_per_block) {
  extern __shared__ int sort_shared[];
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * slots_per_block;
  Sorter sorter(sort_shared, E, static_cast<int>(min(static_cast<int64_t>(slots_per_block), all_slots - first_slot)));
  for (int e = threadIdx.x; e < E; e += kSortThreads) sorter.base[e] = sorter.counts[e] = 0;
  wait_for_kernels_before();
  load_ids(sorter, ids + first_slot);
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

}  // namespace

int64_t sort_blocks(int64_t slots, const Device& device) {
  constexpr int kMost = 8192;  // slots of a block, beside what 1024 experts take of an A100's shared memory
  return std::max<int64_t>(device.multiprocessors, ceil_div(slots, kMost));
}

cudaError_t sort_slots(const int32_t* ids, const SortArguments& s, int E, int64_t slots, const Device& device) {
  constexpr int kFew = 512, kMany = 4096;  // slots of a block of the single launch
  const int64_t few = std::clamp<int64_t>(ceil_div(slots, kFew), 1, device.cluster);
  if (slots <= few * kMany) {
    const int each = static_cast<int>(ceil_div(slots, few));
    const Launch how{few, kSortThreads, Sorter::bytes(E, each), static_cast<int>(few)};
    return launch(sort_kernel, how, device, ids, s, E, slots, each);
  }
  const int each = static_cast<int>(ceil_div(slots, sort_blocks(slots, device)));
  const int64_t blocks = ceil_div(slots, each);
  const cudaError_t error =
      launch(count_kernel, {blocks, kSortThreads, E * sizeof(int)}, device, ids, s, E, slots, each);
  if (error != cudaSuccess) return error;
  return launch(place_kernel, {blocks, kSortThreads, Sorter::bytes(E, each)}, device, ids, s, E, slots, each);
}

}  // namespace moe_lab
