// The activations of the experts.
#pragma once

#include "experts.h"

namespace moe_lab {

// x sigmoid(y) = (x + x tanh(y / 2)) / 2: one instruction of the special unit, which would else bound the results of a
// tile. Its error is 2^-12 of x at most: within the rounding of the result where y > 0, and more than that below, where
// the result is small beside x.
__device__ __forceinline__ float times_sigmoid(float x, float y) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(0.5f * y));
  return 0.5f * fmaf(x, t, x);
}

template <Activation ACTIVATION>
__device__ __forceinline__ float activate(float gate, float up) {
  if constexpr (ACTIVATION == Activation::kSilu) {
    return times_sigmoid(gate, gate) * up;
  } else {
    gate = gate > kClamp ? kClamp : gate;  // NaN stays
    up = up > kClamp ? kClamp : up < -kClamp ? -kClamp : up;
    return times_sigmoid(gate, kClampedSlope * gate) * (up + 1.0f);
  }
}

}  // namespace moe_lab
