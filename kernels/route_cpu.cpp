// route on a CPU: rows in parallel, a row's keys in vectors of sixteen.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "topk_cpu.h"

namespace moe_lab {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Row {
  alignas(64) float logits[kMaxExperts];
  alignas(64) float ranked[kMaxExperts];
  alignas(64) uint32_t keys[kMaxExperts];
  uint32_t chunk_max[kMaxExperts / kChunk];
};

float score_of(Score score, float x, float highest, float total) {
  if (score == Score::kSoftmax) return std::exp(x - highest) / total;
  if (score == Score::kSigmoid) return 1.0f / (1.0f + std::exp(-x));
  return std::sqrt(std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))));
}

// NaN if the row holds one.
float highest_of(const float* x, int E) {
  float highest = -kInfinity;
  for (int e = 0; e < E; ++e) highest = x[e] > highest || x[e] != x[e] ? x[e] : highest;
  return highest;
}

float total_of(const float* x, int E, float highest) {
  float total = 0.0f;
  for (int e = 0; e < E; ++e) total += std::exp(x[e] - highest);
  return total;
}

// -inf is a value too, so what is out is told by its key.
void limit_groups(const RouteArguments& a, Row& row) {
  uint32_t scores[kMaxGroups];
  for (int g = 0; g < a.n_groups; ++g) {
    const float* x = row.ranked + g * a.group_size;
    float first = -kInfinity, second = -kInfinity;
    bool has_nan = false;
    for (int i = 0; i < a.group_size; ++i) {
      has_nan |= x[i] != x[i];
      second = std::max(second, std::min(first, x[i]));
      first = std::max(first, x[i]);
    }
    const float score = (a.group_top2 && a.group_size > 1 ? first + second : first) + 0.0f;
    const uint32_t bits = bits_of(score);
    scores[g] = has_nan || score != score
                    ? 0xffffffffu
                    : bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  }
  for (int g = 0; g < a.n_groups; ++g) {
    int better = 0;
    for (int other = 0; other < a.n_groups; ++other)
      better += scores[other] > scores[g] || (scores[other] == scores[g] && other < g);
    if (better < a.top_groups) continue;
    std::fill_n(row.keys + g * a.group_size, a.group_size, 0);
  }
  for (int c = 0; c < (a.E + kChunk - 1) / kChunk; ++c) {
    row.chunk_max[c] = *std::max_element(row.keys + c * kChunk, row.keys + (c + 1) * kChunk);
  }
}

void route_row(const RouteArguments& a, int64_t t, Row& row) {
  load(a, t, row.logits);
  const bool softmax = a.score == Score::kSoftmax, ranks_scores = a.ranks_scores();
  const float* ranked = row.logits;
  float highest = 0.0f, total = 1.0f;
  if (softmax && (ranks_scores || !a.renormalize)) {
    highest = highest_of(row.logits, a.E);
    total = total_of(row.logits, a.E, highest);
  }
  if (ranks_scores) {
    for (int e = 0; e < a.E; ++e) row.ranked[e] = score_of(a.score, row.logits[e], highest, total);
    for (int e = 0; a.bias != nullptr && e < a.E; ++e) row.ranked[e] += a.bias[e];
    ranked = row.ranked;
  } else if (a.grouped()) {
    std::copy_n(row.logits, a.E, row.ranked);
  }
  const int chunks = (a.E + kChunk - 1) / kChunk;
  keys_of(ranked, a.E, chunks * kChunk, row.keys, row.chunk_max);
  if (a.grouped()) limit_groups(a, row);
  int32_t* ids = a.ids + t * a.k;
  float* weights = a.weights + t * a.k;
  take_largest(row.keys, row.chunk_max, chunks, a.k, ids);

  if (total != total) highest = total;  // a row without a softmax has weights of NaN
  if (softmax && a.renormalize) highest = ranks_scores ? highest : row.logits[ids[0]], total = 1.0f;
  float sum = 0.0f;
  for (int i = 0; i < a.k; ++i) sum += weights[i] = score_of(a.score, row.logits[ids[i]], highest, total);
  const float divisor = a.renormalize ? (sum < 1e-20f ? 1e-20f : sum) : 1.0f;
  for (int i = 0; i < a.k; ++i) weights[i] = a.scale * weights[i] / divisor;
}

}  // namespace

void route_cpu(const RouteArguments& a) {
  torch::stable::parallel_for(0, a.T, std::max<int64_t>(1, 4096 / a.E), [&](int64_t begin, int64_t end) {
    Row row;
    for (int64_t t = begin; t < end; ++t) route_row(a, t, row);
  });
}

}  // namespace moe_lab
