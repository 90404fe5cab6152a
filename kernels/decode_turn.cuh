// A head of a new token, of queries or of keys, on its way to attention: normed, clamped, turned and rounded by a warp.
#pragma once

#include "decode.cuh"
#include "decode.h"

namespace moe_lab {

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float clamped(float x, float clip) { return x > clip ? clip : x < -clip ? -clip : x; }

__device__ __forceinline__ float known(float best) { return best == -INFINITY ? 0.0f : best; }  // nothing seen yet

// What a lane turns one head with: of the norm's weight and the tables the dimensions lane + 32 i.
template <int N>
struct Turn {
  float weight[N], cos[N], sin[N];

  template <class T>
  __device__ __forceinline__ void load(const DecodeAttentionArguments& a, const void* weights, int head) {
    const int lane = threadIdx.x % 32, first = a.norm == QueryNorm::kAll ? head * 32 * N : 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = lane + 32 * i;
      weight[i] = weights == nullptr ? 1.0f : static_cast<float>(static_cast<const T*>(weights)[first + at]);
      cos[i] = a.cos[at], sin[i] = a.sin[at];
    }
  }
};

// y of x, which is a head of a row of `heads`. A lane has the dimensions of its `Turn`.
template <class T, int N>
__device__ __forceinline__ void turned(T (&y)[N], float (&x)[N], const DecodeAttentionArguments& a, const T* row,
                                       const Turn<N>& turn, int heads) {
  constexpr int kAtOnce = 8;  // of 16 bytes a lane
  const int lane = threadIdx.x % 32, all = heads * 32 * N;
  if (a.norm == QueryNorm::kAll) {
    float squares = 0.0f;
    for (int first = lane; first < all / 8; first += 32 * kAtOnce) {
      uint4 part[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + 32 * j;
        part[j] = i < all / 8 ? __ldcg(reinterpret_cast<const uint4*>(row) + i) : uint4{};
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) squares += sum_of_squares<T>(part[j]);
    }
    const float scale = rsqrtf(sum_of_warp(squares) / all + a.eps);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= scale * turn.weight[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = clamped(x[i], a.clip);
  const auto norm_of_head = [&](float (&h)[N]) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) squares += h[i] * h[i];
    const float scale = rsqrtf(sum_of_warp(squares) / (32 * N) + a.eps);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] *= scale * turn.weight[i];
  };
  if (a.norm == QueryNorm::kHead) norm_of_head(x);
  float z[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float other = i < N / 2 ? -x[i + N / 2] : x[i - N / 2];
    z[i] = x[i] * turn.cos[i] + other * turn.sin[i];
  }
  if (a.norm == QueryNorm::kHeadTurned) norm_of_head(z);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = static_cast<T>(z[i]);
}

}  // namespace moe_lab
