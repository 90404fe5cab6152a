// The product with the gate and the route of few tokens, without cuBLAS.
//
// A cluster multiplies some experts, each of its blocks a part of D: a warp takes eight experts, and where there are
// more warps than that needs, several share them and D. The logits are summed over warps and blocks in a fixed order
// and rounded to the dtype of x, as a product in that dtype would be. One cluster that has all experts routes too;
// several write the logits, for a launch of route that waits on its multiprocessors already.
#include <cooperative_groups.h>

#include <utility>

#include "gate.cuh"

namespace moe_lab {
namespace {

constexpr int kGateThreads = 512;
constexpr int kGateWarps = kGateThreads / 32;
constexpr int kMostAlone = 64;  // experts of one cluster; more is faster by more multiprocessors and another launch

// How a product is laid out over a cluster.
struct GateGrid {
  int blocks;   // of a cluster, which share D
  int experts;  // of a cluster
  int parts;    // of a block's warps, which share its part of D
  int each;     // logits that a block of the cluster sums and hands on
};

// parts[part, t, e]: this block's shares of the logits of its cluster's experts [first, first + experts).
template <class Half, int TILES>
__device__ __noinline__ void multiply_gate(const GateArguments& g, const GateGrid& grid, int T, int first, int experts,
                                           int rank, float* parts) {
  constexpr int kAtOnce = TILES == 1 ? 4 : 2;  // steps of a warp under way
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quad = lane % 4;
  const int per_part = kGateWarps / grid.parts, part = warp / per_part;
  const int first_step = rank * grid.parts + part, stride = grid.blocks * grid.parts, steps = g.D / kStep;
  for (int tile = warp % per_part; tile * 8 < experts; tile += per_part) {
    GateRows<TILES> from;
    from.gate = row_of(g.gate, g.gate_stride, first + min(tile * 8 + row, experts - 1));
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const int t = 16 * j + row;
      from.low[j] = t < T ? row_of(g.x, g.x_stride, t) : nullptr;
      from.high[j] = t + 8 < T ? row_of(g.x, g.x_stride, t + 8) : nullptr;
    }
    float sums[TILES][4] = {};
    int step = first_step;
    for (; step + (kAtOnce - 1) * stride < steps; step += kAtOnce * stride)
      multiply_steps<Half, kAtOnce>(sums, from, step, stride);
    if (kAtOnce > 2 && step + stride < steps) {
      multiply_steps<Half, 2>(sums, from, step, stride);
      step += 2 * stride;
    }
    for (; step < steps; step += stride) multiply_steps<Half, 1>(sums, from, step, stride);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int t = 16 * i + row + j / 2 * 8, e = tile * 8 + quad * 2 + j % 2;
        if (t < T && e < experts) parts[(part * T + t) * experts + e] = sums[i][j];
      }
    }
  }
}

// take(i, logit) for the block's share of its cluster's logits, [T, experts] in a row.
// `parts`: [grid.parts, T, experts].
template <class Take>
__device__ __forceinline__ void gate_logits(const RouteArguments& a, const GateArguments& g, const GateGrid& grid,
                                            int first, int experts, int rank, float* parts, Take take) {
#if __CUDA_ARCH__ >= 900
  const int T = static_cast<int>(a.T), all = T * experts;
  const bool is_half = a.dtype == Dtype::kFloat16, is_long = T > 16;
  if (is_half && is_long) multiply_gate<__half, 2>(g, grid, T, first, experts, rank, parts);
  if (is_half && !is_long) multiply_gate<__half, 1>(g, grid, T, first, experts, rank, parts);
  if (!is_half && is_long) multiply_gate<__nv_bfloat16, 2>(g, grid, T, first, experts, rank, parts);
  if (!is_half && !is_long) multiply_gate<__nv_bfloat16, 1>(g, grid, T, first, experts, rank, parts);
  if (grid.parts > 1) {
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += kGateThreads) {
      float sum = parts[i];
      for (int part = 1; part < grid.parts; ++part) sum += parts[part * all + i];
      parts[i] = sum;
    }
  }
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  for (int i = rank * grid.each + threadIdx.x; i < min((rank + 1) * grid.each, all); i += kGateThreads) {
    float sum = 0.0f;
#pragma unroll 16
    for (int block = 0; block < grid.blocks; ++block) sum += *cluster.map_shared_rank(parts + i, block);
    take(i, rounded(sum, a.dtype));
  }
#endif
}

// Several clusters: writes the logits.
__global__ void __launch_bounds__(kGateThreads, 1)
    gate_kernel(const __grid_constant__ RouteArguments a, const __grid_constant__ GateArguments g,
                const __grid_constant__ GateGrid grid) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ float gate_shared[];
  const int rank = blockIdx.x % grid.blocks, first = blockIdx.x / grid.blocks * grid.experts,
            experts = min(grid.experts, a.E - first);
  wait_for_kernels_before();
  auto* logits = static_cast<uint16_t*>(const_cast<void*>(a.logits));
  gate_logits(a, g, grid, first, experts, rank, gate_shared, [&](int i, float logit) {
    const uint16_t bits = a.dtype == Dtype::kFloat16 ? __half_as_ushort(__float2half_rn(logit))
                                                     : __bfloat16_as_ushort(__float2bfloat16_rn(logit));
    logits[i / experts * a.row_stride + first + i % experts] = bits;
  });
  cooperative_groups::this_cluster().sync();  // none leaves while its parts are read
#endif
}

// One cluster: routes.
template <class Rows>
__global__ void __launch_bounds__(kGateThreads, 1)
    gate_route_kernel(const __grid_constant__ RouteArguments a, const __grid_constant__ GateArguments g,
                      const __grid_constant__ GateGrid grid) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ float gate_shared[];
  const int T = static_cast<int>(a.T), E = a.E, padded = (E + 3) / 4 * 4;
  const int most = grid.each / E, begin = blockIdx.x * most, rows = min(most, T - begin);
  float* logits = gate_shared;            // [most, padded]
  float* parts = logits + most * padded;  // [grid.parts, T, E]
  float* scratch = parts + grid.parts * T * E;
  wait_for_kernels_before();
  gate_logits(a, g, grid, 0, E, blockIdx.x, parts,
              [&](int i, float logit) { logits[i / E % most * padded + i % E] = logit; });
  __syncthreads();
  const auto cluster = cooperative_groups::this_cluster();
  auto all_have_read = cluster.barrier_arrive();
  RouteArguments mine = a;
  mine.logits = logits;
  mine.dtype = Dtype::kFloat32;
  mine.row_stride = padded;
  if (rows > 0) {
    Rows::rows(mine, 0, rows, scratch, [&](int64_t row, int rank, int id, float weight) {
      a.ids[(begin + row) * a.k + rank] = id;
      a.weights[(begin + row) * a.k + rank] = weight;
    });
  }
  cluster.barrier_wait(std::move(all_have_read));  // none leaves while its parts are read
#endif
}

GateGrid grid_of(const RouteArguments& a, const GateArguments& g, const Device& device, int64_t experts, bool by_rows) {
  const int64_t steps = g.D / kStep, blocks = std::min<int64_t>(device.cluster, steps);
  int64_t parts = 1;  // so that all warps have something to do
  while (2 * parts * ceil_div(experts, 8) <= kGateWarps && 2 * parts <= steps / blocks) parts *= 2;
  const int64_t each = by_rows ? ceil_div(a.T, blocks) * a.E : ceil_div(a.T * experts, blocks);
  return {static_cast<int>(blocks), static_cast<int>(experts), static_cast<int>(parts), static_cast<int>(each)};
}

size_t bytes_of_parts(const RouteArguments& a, const GateGrid& grid) {
  return grid.parts * a.T * grid.experts * sizeof(float);
}

template <class Rows>
cudaError_t run_gate(const RouteArguments& a, const GateArguments& g, const Device& device) {
  const GateGrid grid = grid_of(a, g, device, a.E, true);
  const size_t logits = grid.each / a.E * ceil_div(a.E, 4) * 4 * sizeof(float);
  const size_t bytes = logits + bytes_of_parts(a, grid) + Rows::scratch_bytes(a, kGateThreads);
  return launch(gate_route_kernel<Rows>, {grid.blocks, kGateThreads, bytes, grid.blocks}, device, a, g, grid);
}

cudaError_t run_one_cluster(RouteArguments a, const GateArguments& g, const Device& device) {
  a.aligned = a.E % 4 == 0 && reinterpret_cast<uintptr_t>(a.bias) % 16 == 0;  // the logits in shared memory are
  if (a.ranks_scores() || a.grouped()) return run_gate<ByWarp<2, true>>(a, g, device);
  if (a.E == 8 && a.k <= 2) return run_gate<ByLanes<2, 2, 4, false>>(a, g, device);
  if (a.E == 64 && a.k <= 8) return run_gate<ByLanes<8, 8, 8, false>>(a, g, device);
  return run_gate<ByWarp<2, false>>(a, g, device);
}

}  // namespace

bool can_route_by_gate(const RouteArguments& a, const GateArguments& g, const Device& device) {
  return device.is_hopper && g.D > 0 && g.D % kStep == 0 && (a.T <= kMostGateTokens || a.E <= kFewExperts);
}

cudaError_t route_by_gate(const RouteArguments& a, const GateArguments& g, const Device& device) {
  if (a.T > kMostGateTokens) return route_by_small_gate(a, g, device);
  if (a.E <= kMostAlone && a.E * a.T <= 8 * kMostAlone) return run_one_cluster(a, g, device);
  constexpr int kClusters = 6;  // of sixteen blocks, which run at once on a Hopper GPU
  const int64_t experts = ceil_div(ceil_div(a.E, kClusters), 8) * 8;
  const GateGrid grid = grid_of(a, g, device, std::min<int64_t>(experts, a.E), false);
  const int64_t blocks = grid.blocks * ceil_div(a.E, grid.experts);
  const cudaError_t error =
      launch(gate_kernel, {blocks, kGateThreads, bytes_of_parts(a, grid), grid.blocks}, device, a, g, grid);
  if (error != cudaSuccess) return error;
  return (a.ranks_scores() || a.grouped() ? route_by_scores : route_by_logits)(a, nullptr, device);
}

}  // namespace moe_lab
