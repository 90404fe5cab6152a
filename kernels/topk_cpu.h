// What the C++ kernels share: a row of logits as floats, and its largest by keys in chunks of sixteen.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "route.h"

// The compiler makes a version for each of these, and the machine takes the best it can run.
#if defined(__x86_64__) && defined(__linux__)
#define MOE_LAB_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOE_LAB_VECTORS
#endif

namespace moe_lab {
namespace {

constexpr int kChunk = 16;

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void load(const RouteArguments& a, int64_t t, float* x) {
  const int64_t at = t * a.row_stride;
  if (a.dtype == Dtype::kFloat32) {
    std::memcpy(x, static_cast<const float*>(a.logits) + at, a.E * sizeof(float));
  } else if (a.dtype == Dtype::kFloat16) {
    const auto* from = static_cast<const uint16_t*>(a.logits) + at;
    for (int e = 0; e < a.E; ++e) x[e] = c10::detail::fp16_ieee_to_fp32_value(from[e]);
  } else {
    const auto* from = static_cast<const uint16_t*>(a.logits) + at;
    for (int e = 0; e < a.E; ++e) x[e] = float_of(static_cast<uint32_t>(from[e]) << 16);
  }
  for (int e = 0; a.gate_bias != nullptr && e < a.E; ++e) x[e] += a.gate_bias[e];
}

// Keys that order as the values do, -0 as +0 and NaN above +inf; never 0, which is no expert.
MOE_LAB_VECTORS void keys_of(const float* ranked, int E, int padded, uint32_t* keys, uint32_t* chunk_max) {
  for (int e = 0; e < E; ++e) {
    uint32_t bits;
    const float x = ranked[e] + 0.0f;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
    keys[e] = x != x ? 0xffffffffu : key;
  }
  for (int e = E; e < padded; ++e) keys[e] = 0;
  for (int c = 0; c < padded / kChunk; ++c) {
    uint32_t best = 0;
    for (int i = 0; i < kChunk; ++i) best = std::max(best, keys[c * kChunk + i]);
    chunk_max[c] = best;
  }
}

// The k largest keys, each taken out as it is found: the first chunk that holds the largest, and there the first key.
MOE_LAB_VECTORS void take_largest(uint32_t* keys, uint32_t* chunk_max, int chunks, int k, int32_t* ids) {
  for (int rank = 0; rank < k; ++rank) {
    uint32_t best = 0;
    for (int c = 0; c < chunks; ++c) best = std::max(best, chunk_max[c]);
    int chunk = 0;
    while (chunk_max[chunk] != best) ++chunk;
    uint32_t* of_chunk = keys + chunk * kChunk;
    int place = kChunk;
    for (int i = 0; i < kChunk; ++i) place = std::min(place, of_chunk[i] == best ? i : kChunk);
    ids[rank] = chunk * kChunk + place;
    of_chunk[place] = 0;
    uint32_t left = 0;
    for (int i = 0; i < kChunk; ++i) left = std::max(left, of_chunk[i]);
    chunk_max[chunk] = left;
  }
}

}  // namespace
}  // namespace moe_lab
