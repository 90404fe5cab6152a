// What the kernels of a decoding step share: eight neighbouring elements of 16 bits at a time.
#pragma once

#include "hopper.cuh"

namespace moe_lab {

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

template <class T>
__device__ __forceinline__ void unpack(float* y, const uint4& a) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = two(as[i], T());
    y[2 * i] = p.x, y[2 * i + 1] = p.y;
  }
}

// f(a, b) of each of eight pairs, rounded.
template <class T, class F>
__device__ __forceinline__ uint4 each(const uint4& a, const uint4& b, F f) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
  uint32_t y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = two(as[i], T()), q = two(bs[i], T());
    y[i] = pack(f(p.x, q.x), f(p.y, q.y), T());
  }
  return {y[0], y[1], y[2], y[3]};
}

template <class T>
__device__ __forceinline__ uint4 add(const uint4& a, const uint4& b) {
  return each<T>(a, b, [](float p, float q) { return p + q; });
}

template <class T>
__device__ __forceinline__ uint4 scaled(const uint4& a, float scale, const uint4& weight) {
  return each<T>(a, weight, [scale](float p, float w) { return p * scale * w; });
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const uint4& a) {
  float2 sum = {};
  multiply<T>(sum, a, a);
  return sum.x + sum.y;
}

// Of all lanes, in the same order in each.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int s = 16; s > 0; s /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, s);
  return x;
}

}  // namespace moe_lab
