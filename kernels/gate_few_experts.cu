// The product with the gate of few experts and the route of many tokens, without cuBLAS: x is read once, at the rate of
// a copy, and the logits never leave the multiprocessor.
//
// A block has 16 tokens, whose D its warps share. The gate, at most eight rows, is read again by every block, from the
// L1 cache.
#include "gate.cuh"

namespace moe_lab {
namespace {

constexpr int kTokens = 16;  // of a block
constexpr int kLogits = kTokens * kFewExperts;
constexpr int kAtOnce = 8;  // steps of a warp under way

template <class Rows, class Half>
__global__ void __launch_bounds__(512)
    gate_few_experts_kernel(const __grid_constant__ RouteArguments a, const __grid_constant__ GateArguments g) {
  extern __shared__ float few_shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, row = lane / 4, quad = lane % 4;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int rows = static_cast<int>(min(a.T - begin, static_cast<int64_t>(kTokens)));
  const int steps = g.D / kStep, each = (steps + warps - 1) / warps, end = min((warp + 1) * each, steps);
  // Tokens and experts beyond the last are the last again.
  const GateRows<1> from = {row_of(g.gate, g.gate_stride, min(row, a.E - 1)),
                            {row_of(g.x, g.x_stride, begin + min(row, rows - 1))},
                            {row_of(g.x, g.x_stride, begin + min(row + 8, rows - 1))}};
  float sums[1][4] = {};
  wait_for_kernels_before();
  int step = warp * each;
  for (; step + kAtOnce <= end; step += kAtOnce) multiply_steps<Half, kAtOnce>(sums, from, step, 1);
  for (; step < end; ++step) multiply_steps<Half, 1>(sums, from, step, 1);
  float* parts = few_shared;  // [warps, tokens, experts]; the first become the logits
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[warp * kLogits + (row + i / 2 * 8) * kFewExperts + quad * 2 + i % 2] = sums[0][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kLogits; i += blockDim.x) {
    float sum = parts[i];
    for (int other = 1; other < warps; ++other) sum += parts[other * kLogits + i];
    parts[i] = rounded(sum, a.dtype);
  }
  __syncthreads();
  RouteArguments mine = a;
  mine.logits = parts;
  mine.dtype = Dtype::kFloat32;
  mine.row_stride = kFewExperts;
  Rows::rows(mine, 0, rows, parts + warps * kLogits, [&](int64_t token, int rank, int id, float weight) {
    a.ids[(begin + token) * a.k + rank] = id;
    a.weights[(begin + token) * a.k + rank] = weight;
  });
}

template <class Rows>
cudaError_t run_rows(const RouteArguments& a, const GateArguments& g, const Device& device) {
  const int64_t blocks = ceil_div(a.T, kTokens);
  int warps = 16;  // fewer where the blocks fill the chip
  while (warps > 4 && blocks * warps > 16 * device.multiprocessors) warps /= 2;
  const Launch how = {blocks, warps * 32, warps * kLogits * sizeof(float) + Rows::scratch_bytes(a, warps * 32)};
  return a.dtype == Dtype::kFloat16 ? launch(gate_few_experts_kernel<Rows, __half>, how, device, a, g)
                                    : launch(gate_few_experts_kernel<Rows, __nv_bfloat16>, how, device, a, g);
}

}  // namespace

cudaError_t route_by_small_gate(RouteArguments a, const GateArguments& g, const Device& device) {
  a.aligned = a.E % 4 == 0 && reinterpret_cast<uintptr_t>(a.bias) % 16 == 0;  // the logits in shared memory are
  if (a.ranks_scores() || a.grouped()) return run_rows<ByWarp<1, true>>(a, g, device);
  if (a.E == 8 && a.k <= 2) return run_rows<ByLanes<2, 2, 4, false>>(a, g, device);
  return run_rows<ByWarp<1, false>>(a, g, device);
}

}  // namespace moe_lab
