// The expert MLPs from end to end: rows of x, up, down, and the sum over a token's slots.
#include "experts.h"

#include "cuda.h"
#include "experts_products.h"
#include "experts_rows.cuh"
#include "route.cuh"

namespace moe_lab {
namespace {

constexpr int kThreads = 256;

// For each slot its token's row of x, scaled.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const uint4* x, const float* weights, uint4* rows, int64_t eights, int K, int of_row) {
  wait_for_kernels_before();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= eights) return;
  const int64_t t = i / of_row, column = i - t * of_row;
#pragma unroll 8
  for (int64_t slot = t * K; slot < (t + 1) * K; ++slot) rows[slot * of_row + column] = scaled<T>(x[i], weights[slot]);
}

template <class T>
cudaError_t scale_rows(const ExpertsArguments& a, const Device& device) {
  const int of_row = a.D / 8;
  const int64_t eights = a.T * of_row;
  return launch(scale_kernel<T>, {ceil_div(eights, kThreads), kThreads}, device, static_cast<const uint4*>(a.x),
                a.weights, static_cast<uint4*>(a.rows), eights, a.K, of_row);
}

}  // namespace

cudaError_t experts(const ExpertsArguments& a, const Device& device) {
  if (a.tiles.of_one_token()) return experts_one_token(a, device);
  const bool bf16 = a.dtype == Dtype::kBFloat16;
  cudaError_t error = cudaSuccess;
  if (a.rows_are_sorted()) {
    error = cudaMemsetAsync(a.rows_copied, 0, counts_of_rows(a.slots()) * sizeof(int32_t), device.stream);
  } else if (a.scales_input) {
    error = (bf16 ? scale_rows<__nv_bfloat16> : scale_rows<__half>)(a, device);
  }
  if (error == cudaSuccess) error = (bf16 ? experts_up_bf16 : experts_up_fp16)(a, device);
  if (error == cudaSuccess) error = (bf16 ? experts_down_bf16 : experts_down_fp16)(a, device);
  if (error != cudaSuccess) return error;
  CombineArguments c = {};
  c.o = a.o, c.y = a.y, c.ids = a.ids;
  c.inverse = a.tiles.in_slot_order() ? nullptr : a.inverse;
  c.weights = a.scales_input ? nullptr : a.weights;
  c.T = a.T, c.rows = a.slots(), c.K = a.K, c.D = a.D, c.E = a.E, c.pieces = a.tiles.pieces;
  c.dtype = a.tiles.pieces > 1 ? Dtype::kFloat32 : a.dtype, c.y_dtype = a.dtype;
  return combine(c, device);
}

}  // namespace moe_lab
