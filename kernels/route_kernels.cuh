// The kernels of route and route_and_sort, for route_by_logits.cu and route_by_scores.cu, which compile side by side.
#pragma once

#include "cuda.h"
#include "route_lanes.cuh"
#include "route_warp.cuh"
#include "sort.cuh"

namespace moe_lab {

// Rows [begin, end) by the block's warps, a row each; emit(row, rank, id, weight).
template <int VALUES, bool SCORES>
struct ByWarp {
  static constexpr int kLanes = 32;
  static size_t scratch_bytes(const RouteArguments& a, int threads) {
    return a.grouped() ? threads / 32 * (a.E + a.n_groups) * sizeof(float) : 0;
  }

  template <class Emit>
  static __device__ __forceinline__ void one(const RouteArguments& a, int64_t row, float* scratch, Emit& emit) {
    const int lane = threadIdx.x % 32;
    int id;
    float weight;
    WarpRow<VALUES, SCORES>{a, lane}.route(row, scratch + threadIdx.x / 32 * (a.E + a.n_groups), id, weight);
    if (lane < a.k) emit(row, lane, id, weight);
  }

  template <class Emit>
  static __device__ __forceinline__ void rows(const RouteArguments& a, int64_t begin, int64_t end, float* scratch,
                                              Emit emit) {
    for (int64_t row = begin + threadIdx.x / 32; row < end; row += blockDim.x / 32) one(a, row, scratch, emit);
  }
};

// The same by LANES each.
template <int KP, int LANES, int VALUES, bool SCORES>
struct ByLanes {
  using Row = LanesRow<KP, LANES, VALUES, SCORES>;
  static constexpr int kLanes = LANES;
  static size_t scratch_bytes(const RouteArguments&, int) { return 0; }

  template <class Emit>
  static __device__ __forceinline__ void rows(const RouteArguments& a, int64_t begin, int64_t end, float*, Emit emit) {
    const Row kernel{a, static_cast<int>(threadIdx.x % LANES)};
    const int in_warp = threadIdx.x % 32 / LANES;
    for (int64_t first = begin + threadIdx.x / 32 * (32 / LANES); first < end; first += blockDim.x / LANES) {
      const int64_t row = min(first + in_warp, end - 1);  // a lane without a row does the last again
      int ids[Row::kMine];
      float weights[Row::kMine];
      kernel.route(row, ids, weights);
#pragma unroll
      for (int m = 0; m < Row::kMine; ++m) {
        if (first + in_warp < end && kernel.is_mine(m)) emit(row, kernel.lane * Row::kMine + m, ids[m], weights[m]);
      }
    }
  }
};

template <class Rows>
__global__ void __launch_bounds__(256) route_kernel(const __grid_constant__ RouteArguments a) {
  extern __shared__ float shared[];
  wait_for_kernels_before();
  const int rows = blockDim.x / Rows::kLanes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows;
  Rows::rows(a, begin, min(begin + rows, a.T), shared, [&](int64_t row, int rank, int id, float weight) {
    a.ids[row * a.k + rank] = id;
    a.weights[row * a.k + rank] = weight;
  });
}

// Few tokens: routes and sorts, in one block or cluster.
template <class Rows>
__global__ void __launch_bounds__(kSortThreads)
    route_and_sort_kernel(const __grid_constant__ RouteArguments a, const __grid_constant__ SortArguments s,
                          int rows_per_block) {
  extern __shared__ float shared[];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_per_block, end = min(begin + rows_per_block, a.T);
  Sorter<false> sorter(reinterpret_cast<int*>(shared), a.E, static_cast<int>(end - begin) * a.k);
  float* scratch = shared + Sorter<false>::bytes(a.E, static_cast<int64_t>(rows_per_block) * a.k) / sizeof(float);
  wait_for_kernels_before();
  Rows::rows(a, begin, end, scratch, [&](int64_t row, int rank, int id, float weight) {
    a.ids[row * a.k + rank] = id;
    a.weights[row * a.k + rank] = weight;
    sorter.ids[(row - begin) * a.k + rank] = static_cast<uint16_t>(id);
  });
  sort_in_cluster(sorter, s, begin * a.k);
}

template <class Rows>
cudaError_t run(const RouteArguments& a, const SortArguments* s, const Device& device) {
  if (s == nullptr) {
    const int threads = 128;
    return launch(route_kernel<Rows>, {ceil_div(a.T * Rows::kLanes, threads), threads, Rows::scratch_bytes(a, threads)},
                  device, a);
  }
  const int64_t blocks = ceil_div(a.T * Rows::kLanes, kSortThreads);
  const int rows = static_cast<int>(ceil_div(a.T, blocks));
  const size_t bytes =
      Sorter<false>::bytes(a.E, static_cast<int64_t>(rows) * a.k) + Rows::scratch_bytes(a, kSortThreads);
  if (blocks <= device.cluster && bytes <= static_cast<size_t>(device.shared_bytes)) {
    return launch(route_and_sort_kernel<Rows>, {blocks, kSortThreads, bytes, static_cast<int>(blocks)}, device, a, *s,
                  rows);
  }
  const cudaError_t error = run<Rows>(a, nullptr, device);
  return error == cudaSuccess ? sort_slots(a.ids, *s, a.E, a.T * a.k, device) : error;
}

// Any E and k.
template <bool SCORES>
cudaError_t run_by_warps(const RouteArguments& a, const SortArguments* s, const Device& device) {
  if (a.E <= 32) return run<ByWarp<1, SCORES>>(a, s, device);
  if (a.E <= 64) return run<ByWarp<2, SCORES>>(a, s, device);
  if (a.E <= 128) return run<ByWarp<4, SCORES>>(a, s, device);
  if (a.E <= 256) return run<ByWarp<8, SCORES>>(a, s, device);
  if (a.E <= 512) return run<ByWarp<16, SCORES>>(a, s, device);
  return run<ByWarp<32, SCORES>>(a, s, device);
}

// Runs `ByLanes` of these and returns, if they fit.
#define MOE_LAB_RUN_IF(KP, LANES, VALUES, SCORES)                                                             \
  if (a.aligned && a.k <= KP && a.E == LANES * VALUES && LanesRow<KP, LANES, VALUES, SCORES>::fits_groups(a)) \
  return run<ByLanes<KP, LANES, VALUES, SCORES>>(a, s, device)

}  // namespace moe_lab
