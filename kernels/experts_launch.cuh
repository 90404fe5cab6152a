// The two products of the expert MLPs in one dtype: the copies of tiles that they need, and their launches.
#pragma once

#include <algorithm>

#include "experts_kernel.cuh"
#include "experts_products.h"

namespace moe_lab {

// The tensors that a kernel copies tiles of. The function that describes one to the hardware is the driver's, which
// nothing here is linked with.
struct Maps {
  CUtensorMap weights, tokens, results;
  CUtensorMapDataType dtype;
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  bool made = true;

  explicit Maps(Dtype dtype)
      : weights(), tokens(), results(),
        dtype(dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    made = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ==
               cudaSuccess &&
           found == cudaDriverEntryPointSuccess;
    encode = reinterpret_cast<decltype(encode)>(function);
  }

  // A contiguous tensor of 16-bit elements, the last dimension first; of each copy `box`.
  template <int N>
  void make(CUtensorMap& map, const void* data, const cuuint64_t (&sizes)[N], const cuuint32_t (&box)[N]) {
    cuuint64_t strides[N] = {}, bytes = 2;
    cuuint32_t ones[N];
    for (int i = 0; i < N; ++i) strides[i] = bytes *= sizes[i], ones[i] = 1;
    made = made && encode(&map, dtype, N, const_cast<void*>(data), sizes, strides, box, ones,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }
};

template <class T, class Shape, bool UP, bool GATHERS, bool PARTIAL, Activation ACTIVATION>
cudaError_t launch_product(const ExpertsArguments& e, const Device& device) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  MatmulArguments a = {};
  a.slots = e.slots();
  a.E = e.E, a.rows = UP ? e.F : e.D, a.depth = UP ? e.D : e.F;
  // Rows that are gathered may be copies already, one of each slot; those that are read by tiles the kernel copies.
  const bool has_rows = GATHERS && e.rows != nullptr;
  a.x = has_rows ? e.rows : e.x;
  a.slots_per_row = has_rows ? 1 : e.K;
  if (UP && !GATHERS) {
    a.rows_of_slots = e.rows, a.rows_copied = e.rows_copied;
    a.scales = e.scales_input ? e.weights : nullptr;
  }
  a.ids = e.offsets == nullptr ? e.ids : nullptr;
  a.offsets = e.offsets, a.perm = e.perm;
  a.bias = UP ? e.gate_up_bias : e.down_bias;
  a.out = UP ? e.h : e.o;
  a.tokens = UP ? e.tiles.up_tokens : e.tiles.down_tokens;
  a.row_tiles = static_cast<int>(ceil_div(a.rows, UP ? Shape::kRows / 2 : Shape::kRows));
  a.row_group = 12;  // 12 tiles of weights by 11 of tokens are what 132 blocks hold at once
  a.pieces = PARTIAL ? e.tiles.pieces : 1;
  a.piece_depth = static_cast<int>(ceil_div(ceil_div(a.depth, a.pieces), kDepth) * kDepth);
  a.box = Shape::kGroups == 1 ? 16 : 32;

  constexpr int kOfBlock = 1024;  // what each block takes of a multiprocessor's shared memory beside its own
  const int64_t room = (device.shared_bytes + kOfBlock) / Shape::kBlocksPerSm - kOfBlock;
  const int beside = Shape::bytes_beside_stages(a.tokens, a.E, a.ids != nullptr ? a.slots : 0);
  a.stages = static_cast<int>(std::min<int64_t>(kMostStages, (room - beside) / Shape::stage_bytes(a.tokens)));
  // Gathered rows are announced a step late, and a stage is free when the step after it is multiplied.
  if (a.stages < (GATHERS ? 3 : 2)) return cudaErrorInvalidConfiguration;
  // Where weights are read once, memory bounds the kernel. With four stages two at once would leave too few under way
  // (315 us in place of 236 at OLMoE's shape, T = 512, on an H200).
  const bool reads_once = a.slots <= static_cast<int64_t>(e.E) * a.tokens;
  a.together = reads_once && a.stages >= 5 ? 2 : 1;
  a.policy = reads_once ? policy_of_weights(e, device) : kStay;

  Maps maps(e.dtype);
  const cuuint64_t E = size(e.E), D = size(e.D), F = size(e.F), slots = size(a.slots), depth = size(a.depth);
  const cuuint32_t box = static_cast<cuuint32_t>(a.box);
  if constexpr (UP) {
    maps.make<4>(maps.weights, e.w_gate_up, {D, F, 2, E}, {kDepth, Shape::kRows / 2, 2, 1});
  } else {
    maps.make<3>(maps.weights, e.w_down, {F, D, E}, {kDepth, Shape::kRows, 1});
  }
  if constexpr (!GATHERS) maps.make<2>(maps.tokens, UP ? e.rows : e.h, {depth, slots}, {kDepth, box});
  if constexpr (Shape::kGroups == 2) maps.make<2>(maps.results, a.out, {size(a.rows), slots}, {64, 16});
  if (!maps.made) return cudaErrorNotSupported;

  const int64_t token_tiles = std::min<int64_t>(a.slots, a.slots / a.tokens + a.E);  // at most
  const Launch how{
      std::min<int64_t>(token_tiles * a.row_tiles * a.pieces, device.multiprocessors * Shape::kBlocksPerSm),
      Shape::kThreads, static_cast<size_t>(beside + a.stages * Shape::stage_bytes(a.tokens))};
  return launch(experts_kernel<T, Shape, UP, GATHERS, PARTIAL, ACTIVATION>, how, device, maps.weights, maps.tokens,
                maps.results, a);
}

template <class T, Activation ACTIVATION>
cudaError_t launch_up(const ExpertsArguments& e, const Device& device) {
  if (e.tiles.up_rows == 128 && e.tiles.up_tokens == 16) {
    return launch_product<T, FewTile, true, true, false, ACTIVATION>(e, device);
  }
  if (e.tiles.up_rows == 128) return launch_product<T, NarrowTile, true, true, false, ACTIVATION>(e, device);
  if (e.rows_are_sorted()) return launch_product<T, WideTile, true, false, false, ACTIVATION>(e, device);
  return launch_product<T, WideTile, true, true, false, ACTIVATION>(e, device);
}

template <class T, class Shape>
cudaError_t launch_narrow_down(const ExpertsArguments& e, const Device& device) {
  constexpr Activation kNone = Activation::kSilu;  // it has none
  if (e.tiles.pieces > 1) return launch_product<T, Shape, false, false, true, kNone>(e, device);
  return launch_product<T, Shape, false, false, false, kNone>(e, device);
}

template <class T>
cudaError_t launch_down(const ExpertsArguments& e, const Device& device) {
  if (e.tiles.down_rows == 256) return launch_product<T, WideTile, false, false, false, Activation::kSilu>(e, device);
  return (e.tiles.down_tokens == 16 ? launch_narrow_down<T, FewTile> : launch_narrow_down<T, NarrowTile>)(e, device);
}

}  // namespace moe_lab
