// What the kernels that multiply with the gate share.
#pragma once

#include "products.cuh"
#include "route_kernels.cuh"

namespace moe_lab {

constexpr int kStep = 32;  // elements of D that a warp multiplies at once: 16 bytes a lane, four lanes a row

// Where a lane's rows begin: of the gate the expert lane / 4, of x the tokens lane / 4 and 8 further of each tile of
// 16, or null where there is none.
template <int TILES>
struct GateRows {
  const uint16_t *gate, *low[TILES], *high[TILES];
};

__device__ __forceinline__ const uint16_t* row_of(const void* base, int64_t stride, int64_t row) {
  return static_cast<const uint16_t*>(base) + row * stride + threadIdx.x % 4 * 8;
}

__device__ __forceinline__ uint4 load_16(const uint16_t* row, int at) {
  return row == nullptr ? uint4{0, 0, 0, 0} : *reinterpret_cast<const uint4*>(row + at);
}

// sums += N steps of the product, `stride` steps apart.
//
// The order of the elements of D within a product is free, so each lane takes eight neighbours of its row at once, of x
// and of the gate alike, and hands them to two products in pairs.
template <class Half, int N, int TILES>
__device__ __forceinline__ void multiply_steps(float (&sums)[TILES][4], const GateRows<TILES>& from, int first,
                                               int stride) {
  uint4 w[N], low[N][TILES], high[N][TILES];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int at = (first + i * stride) * kStep;
    w[i] = load_16(from.gate, at);
#pragma unroll
    for (int j = 0; j < TILES; ++j) low[i][j] = load_16(from.low[j], at), high[i][j] = load_16(from.high[j], at);
  }
  __syncwarp();  // all loads are under way: else ptxas puts each before its use
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      multiply_16x8(sums[j], {low[i][j].x, high[i][j].x, low[i][j].y, high[i][j].y}, w[i].x, w[i].y, Half());
      multiply_16x8(sums[j], {low[i][j].z, high[i][j].z, low[i][j].w, high[i][j].w}, w[i].z, w[i].w, Half());
    }
  }
}

// As a product in that dtype would be.
__device__ __forceinline__ float rounded(float x, Dtype dtype) {
  return dtype == Dtype::kFloat16 ? __half2float(__float2half_rn(x)) : __bfloat162float(__float2bfloat16_rn(x));
}

}  // namespace moe_lab
