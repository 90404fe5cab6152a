// The KP largest keys of a row that a few lanes hold: sorting networks in registers, merged between lanes by shuffles.
//
// A key orders as its value does and, among equal values, the lower index higher. Batcher, "Sorting networks and their
// applications", 1968.
#pragma once

#include <cstdint>

namespace moe_lab {

constexpr unsigned kAll = 0xffffffffu;  // every lane of a warp

// Orders as the float does, and is never 0: -0 equals +0, and NaN is above +inf (adding zero makes every NaN the one
// positive NaN).
__device__ __forceinline__ uint32_t ordered(float x) {
  const int bits = __float_as_int(x + 0.0f);
  return static_cast<uint32_t>(bits ^ ((bits >> 31) | 0x80000000));
}

// Its inverse.
__device__ __forceinline__ float value_of(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

template <class Key>
__device__ __forceinline__ void exchange(Key& high, Key& low) {
  const Key larger = max(high, low), smaller = min(high, low);
  high = larger;
  low = smaller;
}

// One comparison level of the odd-even merge of runs of P keys into runs of 2 P.
template <int P, int Q, int N, class Key>
__device__ __forceinline__ void merge_runs(Key (&keys)[N]) {
#pragma unroll
  for (int i = Q % P; i < N - Q; ++i) {
    if ((i - Q % P) / Q % 2 == 0 && i / (2 * P) == (i + Q) / (2 * P)) exchange(keys[i], keys[i + Q]);
  }
  if constexpr (Q > 1) merge_runs<P, Q / 2>(keys);
}

// Descending.
template <int P = 1, int N, class Key>
__device__ __forceinline__ void sort(Key (&keys)[N]) {
  if constexpr (P < N) {
    merge_runs<P, P>(keys);
    sort<2 * P>(keys);
  }
}

// Descending, of keys that rise and then fall or fall and then rise.
template <int STRIDE, int N, class Key>
__device__ __forceinline__ void sort_bitonic(Key (&keys)[N]) {
  if constexpr (STRIDE > 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((i & STRIDE) == 0) exchange(keys[i], keys[i + STRIDE]);
    }
    sort_bitonic<STRIDE / 2>(keys);
  }
}

// `best`, descending, becomes the N largest of itself and `other`, descending.
template <int N, class Key>
__device__ __forceinline__ void merge(Key (&best)[N], const Key (&other)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) best[i] = max(best[i], other[N - 1 - i]);
  sort_bitonic<N / 2>(best);
}

// After this all LANES neighbouring lanes hold the N largest keys of all of them.
template <int LANES, int STEP = 1, int N, class Key>
__device__ __forceinline__ void merge_lanes(Key (&best)[N]) {
  if constexpr (STEP < LANES) {
    Key other[N];
#pragma unroll
    for (int i = 0; i < N; ++i) other[i] = __shfl_xor_sync(kAll, best[i], STEP);
    merge(best, other);
    merge_lanes<LANES, 2 * STEP>(best);
  }
}

}  // namespace moe_lab
