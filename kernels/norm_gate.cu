// The norm before an MLP, the product with the gate and the route, of a few tokens.
//
// Each token has a cluster, to whose blocks the experts are dealt. Each block asks for its rows of the gate and for the
// norm's weight while the kernels before still run: no kernel of a pass writes weights. Then each norms the token for
// itself, which takes less time than to tell the others, and sends its logits to the first block, which routes. Sums
// have a fixed order, and logits are rounded to the dtype of x, as a product in that dtype would be.
#include <cooperative_groups.h>

#include "decode.cuh"
#include "route_kernels.cuh"

namespace moe_lab {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kFewBlocks = 8;        // of a cluster, where a block's part of the gate is small
constexpr int kSmallGate = 1 << 18;  // elements
constexpr int kVectors = 2;          // of 16 bytes, that a thread norms
static_assert(kMostNormWidth == 8 * kVectors * kThreads);

// Block b of `blocks` has the experts b, b + blocks, ..., `experts` of them at most; of each `parts` warps share D.
struct NormGrid {
  int blocks, experts, log2_parts;

  __host__ __device__ constexpr int parts() const { return 1 << log2_parts; }
};

// A block's shared memory; what has E is used in the first one only.
struct NormShared {
  uint64_t* barriers;              // [2]
  float* squares;                  // [kWarps]
  uint4 *gate, *weight, *normed;   // [experts, D], [D], [D]
  float *logits, *sums, *scratch;  // [E], [parts, E], of `Rows`

  __host__ __device__ NormShared(uint8_t* memory, const NormGrid& grid, int D, int E)
      : barriers(reinterpret_cast<uint64_t*>(memory)), squares(reinterpret_cast<float*>(barriers + 2)),
        gate(reinterpret_cast<uint4*>(squares + kWarps)), weight(gate + grid.experts * D / 8), normed(weight + D / 8),
        logits(reinterpret_cast<float*>(normed + D / 8)), sums(logits + (E + 3) / 4 * 4),
        scratch(sums + grid.parts() * E) {}
};

// x + residual of this thread's vectors of a token, and the sum of squares of all of them.
template <class Half>
__device__ __forceinline__ float add_residual(const uint4* x, const uint4* residual, int vectors,
                                              uint4 (&totals)[kVectors], float* squares) {
  uint4 residuals[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * kThreads;
    totals[i] = v < vectors ? x[v] : uint4{};
    residuals[i] = v < vectors ? residual[v] : uint4{};
  }
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    totals[i] = add<Half>(totals[i], residuals[i]);
    square += sum_of_squares<Half>(totals[i]);
  }
  square = sum_of_warp(square);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
  __syncthreads();
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sums[i % 4] += squares[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class Half, class Rows>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gate_kernel(const __grid_constant__ RouteArguments a, const __grid_constant__ NormGateArguments g,
                     const __grid_constant__ NormGrid grid) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) uint8_t norm_shared[];
  const NormShared shared(norm_shared, grid, g.D, a.E);
  const Barrier weights_are_here{shared_address(shared.barriers)}, sums_are_here{shared_address(shared.barriers + 1)};
  const int token = blockIdx.x / grid.blocks, block = blockIdx.x % grid.blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = g.D / 8;
  const int parts = grid.parts(), experts = (a.E - block + grid.blocks - 1) / grid.blocks;
  if (threadIdx.x == 0) {
    weights_are_here.init(1), sums_are_here.init(1);
    fence_barriers();
    sums_are_here.arrive_and_expect(parts * a.E * static_cast<int>(sizeof(float)));
    weights_are_here.arrive_and_expect((experts + 1) * 2 * g.D);
    load_bytes(shared_address(shared.weight), g.norm_weight, 2 * g.D, weights_are_here, kStay);
    for (int j = 0; j < experts; ++j) {
      const uint4* row = static_cast<const uint4*>(g.gate) + static_cast<int64_t>(block + j * grid.blocks) * vectors;
      load_bytes(shared_address(shared.gate + j * vectors), row, 2 * g.D, weights_are_here, kStay);
    }
  }
  cooperative_groups::this_cluster().sync();  // the first block's barrier is there
  wait_for_kernels_before();

  uint4 totals[kVectors];
  const int64_t first = static_cast<int64_t>(token) * vectors;
  const float squares =
      add_residual<Half>(static_cast<const uint4*>(g.x) + first, static_cast<const uint4*>(g.residual) + first, vectors,
                         totals, shared.squares);
  const float scale = rsqrtf(__fdividef(squares, g.D) + g.eps);
  weights_are_here.wait(0);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * kThreads;
    if (v >= vectors) break;
    const uint4 normed = scaled<Half>(totals[i], scale, shared.weight[v]);
    shared.normed[v] = normed;
    if (block == grid.blocks - 1) {  // the first has more to do
      static_cast<uint4*>(g.normed)[first + v] = normed;
      static_cast<uint4*>(g.total)[first + v] = totals[i];
    }
  }
  __syncthreads();

  const uint32_t sums = in_block(shared_address(shared.sums), 0), arrived = in_block(sums_are_here.at, 0);
  for (int i = warp; i < experts * parts; i += kWarps) {
    const int j = i >> grid.log2_parts, part = i & (parts - 1);
    float2 sum = {};
#pragma unroll 4
    for (int v = part * 32 + lane; v < vectors; v += parts * 32) {
      multiply<Half>(sum, shared.gate[j * vectors + v], shared.normed[v]);
    }
    const float whole = sum_of_warp(sum.x + sum.y);
    if (lane == 0) send(sums + 4 * (part * a.E + block + j * grid.blocks), whole, arrived);
  }
  if (block > 0 || warp > 0) return;

  sums_are_here.wait(0);
  for (int e = lane; e < a.E; e += 32) {
    float logit = 0.0f;
    for (int part = 0; part < parts; ++part) logit += shared.sums[part * a.E + e];
    shared.logits[e] = static_cast<float>(static_cast<Half>(logit));
  }
  __syncwarp();
  RouteArguments mine = a;
  mine.logits = shared.logits;
  mine.dtype = Dtype::kFloat32;
  Rows::rows(mine, 0, 1, shared.scratch, [&](int64_t, int rank, int id, float weight) {
    a.ids[token * a.k + rank] = id;
    a.weights[token * a.k + rank] = weight;
  });
#endif
}

NormGrid grid_of(const RouteArguments& a, const NormGateArguments& g, const Device& device) {
  const int most = int64_t{a.E} * g.D <= kSmallGate ? kFewBlocks : device.cluster;
  const int blocks = std::min(most, a.E), experts = static_cast<int>(ceil_div(a.E, blocks));
  int log2_parts = 0;  // so that all warps have something to do
  while ((2 << log2_parts) * experts <= kWarps) ++log2_parts;
  return {blocks, experts, log2_parts};
}

size_t shared_bytes(const RouteArguments& a, const NormGateArguments& g, const NormGrid& grid) {
  const NormShared shared(nullptr, grid, g.D, a.E);
  return reinterpret_cast<size_t>(shared.scratch) + ByWarp<2, true>::scratch_bytes(a, 32);  // what any `Rows` needs
}

template <class Rows>
cudaError_t run_norm_gate(const RouteArguments& a, const NormGateArguments& g, const Device& device) {
  const NormGrid grid = grid_of(a, g, device);
  const Launch how = {a.T * grid.blocks, kThreads, shared_bytes(a, g, grid), grid.blocks};
  return a.dtype == Dtype::kFloat16 ? launch(norm_gate_kernel<__half, Rows>, how, device, a, g, grid)
                                    : launch(norm_gate_kernel<__nv_bfloat16, Rows>, how, device, a, g, grid);
}

}  // namespace

bool can_norm_and_route(const RouteArguments& a, const NormGateArguments& g, const Device& device) {
  // One expert would be one block, which has no cluster to send to.
  return device.is_hopper && a.T <= kMostRows && a.E > 1 && g.D > 0 && g.D % 8 == 0 && g.D <= kMostNormWidth &&
         a.E <= kMostNormExperts && int64_t{a.E} * g.D <= kMostNormGate &&
         static_cast<int64_t>(shared_bytes(a, g, grid_of(a, g, device))) <= device.shared_bytes;
}

cudaError_t norm_and_route(RouteArguments a, const NormGateArguments& g, const Device& device) {
  a.aligned = a.E % 4 == 0 && reinterpret_cast<uintptr_t>(a.bias) % 16 == 0;  // the logits in shared memory are
  if (a.ranks_scores() || a.grouped()) {
    return (a.E <= 64 ? run_norm_gate<ByWarp<2, true>> : run_norm_gate<ByWarp<8, true>>)(a, g, device);
  }
  if (a.E == 8 && a.k <= 2) return run_norm_gate<ByLanes<2, 2, 4, false>>(a, g, device);
  if (a.E == 64 && a.k <= 8) return run_norm_gate<ByLanes<8, 8, 8, false>>(a, g, device);
  if (a.E == 128 && a.k <= 8) return run_norm_gate<ByLanes<8, 8, 16, false>>(a, g, device);
  return (a.E <= 64 ? run_norm_gate<ByWarp<2, false>> : run_norm_gate<ByWarp<8, false>>)(a, g, device);
}

}  // namespace moe_lab
