// What the kernels of route share: loads, scores, sums over lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "route.h"
#include "topk.cuh"

namespace moe_lab {

constexpr float kInfinity = __builtin_huge_valf();

// The kernel after this one may be launched; none of the kernels before is read or overwritten above the wait.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float load_one(const RouteArguments& a, int64_t row, int e) {
  const int64_t at = row * a.row_stride + e;
  float x;
  if (a.dtype == Dtype::kFloat32) {
    x = static_cast<const float*>(a.logits)[at];
  } else if (a.dtype == Dtype::kFloat16) {
    x = __half2float(static_cast<const __half*>(a.logits)[at]);
  } else {
    x = __bfloat162float(static_cast<const __nv_bfloat16*>(a.logits)[at]);
  }
  return a.gate_bias == nullptr ? x : x + a.gate_bias[e];
}

// Fours of neighbours, where rows are aligned to four elements: x[4 i ...] from expert first + i * step, where that is
// below E. One branch on the dtype, so that all loads are under way together.
template <int VALUES>
__device__ __forceinline__ void load_fours(const RouteArguments& a, int64_t row, int first, int step,
                                           float (&x)[VALUES]) {
  const int64_t at = row * a.row_stride + first;
  if (a.dtype == Dtype::kFloat32) {
    const float* from = static_cast<const float*>(a.logits) + at;
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) {
      if (first + i * step >= a.E) continue;
      const float4 four = *reinterpret_cast<const float4*>(from + i * step);
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(a.logits) + at;
    uint2 fours[VALUES / 4];
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) {
      if (first + i * step < a.E) fours[i] = *reinterpret_cast<const uint2*>(from + i * step);
    }
    if (a.dtype == Dtype::kFloat16) {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        const uint32_t pair = i % 4 < 2 ? fours[i / 4].x : fours[i / 4].y;
        x[i] = __half2float(__ushort_as_half(i % 2 == 0 ? pair & 0xffff : pair >> 16));
      }
    } else {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        const uint32_t pair = i % 4 < 2 ? fours[i / 4].x : fours[i / 4].y;
        x[i] = __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
      }
    }
  }
  if (a.gate_bias != nullptr) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      if (first + i / 4 * step < a.E) x[i] += a.gate_bias[first + i / 4 * step + i % 4];
    }
  }
}

// The score of a logit whose row has the largest logit `highest` and the sum `total` of exp(logit - highest).
__device__ __forceinline__ float score_of(Score score, float x, float highest, float total) {
  if (score == Score::kSoftmax) return __fdividef(__expf(x - highest), total);
  if (score == Score::kSigmoid) return __fdividef(1.0f, 1.0f + expf(-x));
  return sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
}

// The scores of all of them, by one branch on the kind.
template <int VALUES>
__device__ __forceinline__ void scores_of(Score score, float (&x)[VALUES], float highest, float total) {
  if (score == Score::kSoftmax) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) x[i] = score_of(Score::kSoftmax, x[i], highest, total);
  } else if (score == Score::kSigmoid) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) x[i] = score_of(Score::kSigmoid, x[i], highest, total);
  } else {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) x[i] = score_of(Score::kSqrtSoftplus, x[i], highest, total);
  }
}

template <int LANES>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

template <int LANES, class Number>
__device__ __forceinline__ Number max_lanes(Number x) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) x = max(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// NaN stays.
__device__ __forceinline__ float not_zero(float sum) { return sum < 1e-20f ? 1e-20f : sum; }

}  // namespace moe_lab
