// The expert MLPs: what the op asks of the CUDA and the C++ half.
#pragma once

#include <cstdint>

#include "route.h"

namespace moe_lab {

enum class Activation : int { kSilu, kClamped };  // silu(g) u; or gpt-oss's, both clamped: g sigmoid(1.702 g) (u + 1)

constexpr float kClamp = 7.0f, kClampedSlope = 1.702f;
constexpr int kFewSlots = 1024;     // that the blocks of the kernels sort for themselves
constexpr int kMostNumbers = 2560;  // of slots and experts, in shared memory beside three stages of the largest tiles
constexpr int kMostSlotsOfOne = 32, kMostVectorsOfOne = 50'000;  // of one token: K; D, and K F

// Of `rows_copied`: rows are counted by 256. The last element counts those that some warp has taken.
constexpr int kRowsOfCount = 256;
constexpr int64_t counts_of_rows(int64_t slots) { return (slots + kRowsOfCount - 1) / kRowsOfCount + 1; }

// Rows of the weights in a tile (128 or 256), its tokens at most (a multiple of 16 up to 64, or of 32 up to 192), and
// the pieces of the sum over F (of 128 rows). All are 1 where the kernel for one token computes.
struct Tiles {
  int up_rows, up_tokens, down_rows, down_tokens, pieces;

  constexpr bool of_one_token() const { return up_rows == 1; }

  // Whether `down` leaves its results in the order of the slots, or sorted.
  constexpr bool in_slot_order() const { return down_rows == 128; }
};

// y[t] = sum over the used slots s of token t of w[t, s] * act(x[t] W_gate^T, x[t] W_up^T) W_down^T, of expert ids[t,
// s]; the weight multiplies x[t] instead where `scales_input`. h and o are rounded to the dtype, sums are float32.
struct ExpertsArguments {
  const void* x;              // [T, D]
  const int32_t* ids;         // [T, K], outside [0, E) for an unused slot
  const float* weights;       // [T, K]
  const void* w_gate_up;      // [E, 2F, D]
  const void* w_down;         // [E, D, F]
  const float* gate_up_bias;  // [E, 2F], or null
  const float* down_bias;     // [E, D], or null
  void* y;                    // [T, D]
  int64_t T;
  int K, E, D, F;
  Dtype dtype;  // float16 or bfloat16
  Activation activation;
  bool scales_input;
  Tiles tiles;
  // of the CUDA half
  const int32_t *offsets, *perm, *inverse;  // the sorted slots; null where the blocks sort
  void* rows;                               // scratch [slots, D], null where rows of x are gathered as they are read
  int32_t* rows_copied;                     // scratch [counts_of_rows(slots)], where they are sorted
  void* h;                                  // scratch [slots, F]
  void* o;                                  // scratch [slots, D], or float [pieces, slots, D]; not of one token

  constexpr int64_t slots() const { return T * K; }
  // Whether each slot needs its row of x for itself: to scale it, or to read it by tiles. The threads' own copies,
  // which gather rows, bound wide tiles of many tokens (590 TFLOP/s against 740 at mixtral's shape on an H200).
  constexpr bool copies_rows() const { return (scales_input && !tiles.of_one_token()) || rows_are_sorted(); }
  constexpr bool rows_are_sorted() const { return tiles.up_rows == 256 && slots() >= int64_t{96} * E; }
  // Whether the blocks sort the slots for themselves.
  constexpr bool sorts_itself() const {
    const bool fit = slots() <= kFewSlots && slots() + 2 * E <= kMostNumbers;
    return tiles.of_one_token() || (fit && tiles.in_slot_order() && !rows_are_sorted());
  }
};

void experts_cpu(const ExpertsArguments& a);

}  // namespace moe_lab
