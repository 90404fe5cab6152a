// A step of one new token per sequence: what the ops ask of the kernels that are not the experts' or the router's.
#pragma once

#include <cstdint>

#include "route.h"

namespace moe_lab {

constexpr int kMostColumns = 8192, kMostColumnsAlone = 16384;  // of a row that `gemv` norms, or multiplies as it is
constexpr int kMostRows = 8, kMostElements = 1 << 16;          // of all rows together

// y = x W^T [+ bias], of a few rows x, in 16 bytes at a time. With `norm` a row of x is RMSNorm(x + residual) * norm,
// the sum rounded before it is squared, as if it had been stored.
struct GemvArguments {
  const void* x;         // [T, K]
  const void* residual;  // [T, K], or null: x alone
  const void* norm;      // [K], or null: x as it is
  const void* weight;    // [N, K]
  const void* bias;      // [N], or null
  void* y;               // [T, N]
  void* total;           // [T, K], where x + residual goes; with `norm` only
  int T, N, K;
  float eps;
  Dtype dtype;
};

constexpr int kMostQueries = 8;  // heads that share one of keys

enum class QueryNorm : int { kNone, kHead, kAll, kHeadTurned };  // of each head, of all as one, of each once turned

// One new token of each sequence on its cache, all at the same position. Each `G` neighbouring heads of queries share
// one of keys. All tensors but the tables have one dtype of 16 bits.
struct DecodeAttentionArguments {
  const void *q, *k, *v;  // [B, H d] and [B, H/G d], rows `q_row`, `k_row`, `v_row` elements apart
  const void *q_norm, *k_norm;
  const float *cos, *sin;   // [d]
  const int64_t* position;  // of the token
  void *k_cache, *v_cache;  // [B, H/G, N, d], sequences `cache_row` elements apart
  const void* sinks;        // [H], or null
  void* y;                  // [B, H, d]
  int64_t q_row, k_row, v_row, cache_row;
  int B, H, G, N, d, window;
  float eps, clip, scale;
  QueryNorm norm;
  Dtype dtype;
};

}  // namespace moe_lab
