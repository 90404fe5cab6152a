// The expert MLPs from end to end: rows of x, up, down, and the sum over a token's slots.
#include "experts.h"

#include "cuda.h"
#include "experts_products.h"
#include "route.cuh"

namespace moe_lab {
namespace {

constexpr int kThreads = 256;

// Copies of the rows of x for each slot, in sorted order or that of the slots; scaled where there are weights.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const uint4* x, const int32_t* ids, const float* weights, const int32_t* inverse, uint4* rows,
                int64_t pieces, int K, int pieces_of_row) {
  wait_for_kernels_before();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pieces) return;
  const int64_t t = i / pieces_of_row, column = i - t * pieces_of_row;
  const uint4 eight = x[i];
  const T* const values = reinterpret_cast<const T*>(&eight);
#pragma unroll 8
  for (int64_t slot = t * K; slot < (t + 1) * K; ++slot) {
    uint4 scaled = eight;
    if (weights != nullptr) {
      T* const to = reinterpret_cast<T*>(&scaled);
#pragma unroll
      for (int v = 0; v < 8; ++v) to[v] = static_cast<T>(static_cast<float>(values[v]) * weights[slot]);
    }
    if (ids[slot] >= 0) rows[(inverse == nullptr ? slot : inverse[slot]) * pieces_of_row + column] = scaled;
  }
}

template <class T>
cudaError_t copy_rows(const ExpertsArguments& a, const Device& device) {
  const int of_row = a.D / 8;
  const int64_t pieces = a.T * of_row;
  return launch(rows_kernel<T>, {ceil_div(pieces, kThreads), kThreads}, device, static_cast<const uint4*>(a.x), a.ids,
                a.scales_input ? a.weights : nullptr, a.rows_are_sorted() ? a.inverse : nullptr,
                static_cast<uint4*>(a.rows), pieces, a.K, of_row);
}

}  // namespace

cudaError_t experts(const ExpertsArguments& a, const Device& device) {
  const bool bf16 = a.dtype == Dtype::kBFloat16;
  cudaError_t error = cudaSuccess;
  if (a.rows != nullptr) error = (bf16 ? copy_rows<__nv_bfloat16> : copy_rows<__half>)(a, device);
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
