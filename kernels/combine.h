// The weighted sum of each token's expert outputs: what the op and the kernels of the experts ask for.
#pragma once

#include <cstdint>

#include "route.h"

namespace moe_lab {

// y[t] = sum over the used slots s of token t, in their order, of weights[t, s] * o[inverse[t * K + s]]. A row of o is
// the sum of its pieces in their order. Products and sums in float32, each rounded; y is rounded once more.
struct CombineArguments {
  const void* o;           // [pieces, rows, D]
  const int32_t* inverse;  // [T * K], or null: the row of a slot is the slot's flat index
  const int32_t* ids;      // [T, K], outside [0, E) for an unused slot, whose row and weight are not read; or null
  const bool* used;        // [T, K], where ids are null
  const float* weights;    // [T, K], or null: all are 1
  void* y;                 // [T, D]
  int64_t T, rows;
  int K, D, pieces;
  uint32_t E = uint32_t{1} << 31;  // all that are not negative, where nobody says how many experts there are
  Dtype dtype, y_dtype;            // of o and of y
};

void combine_cpu(const CombineArguments& a);

}  // namespace moe_lab
