// Sinkhorn's plan and the k best of each token on a CPU: parts of the rows in parallel, vectors of sixteen experts. The
// parts depend on the size alone and their columns are summed in order, so any number of threads finds the same.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <vector>

#include "topk_cpu.h"

namespace moe_lab {
namespace {

constexpr float kLog2e = 1.442695041f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x for x <= 0, within 2e-7 of it; 0 below -125.
inline float exp2_of(float x) {
  const float in_range = x > -125.0f ? x : -125.0f;
  const float shifted = in_range + 12582912.0f;  // 1.5 * 2^23: the whole part stands in the lowest bits
  const float f = in_range - (shifted - 12582912.0f);
  // The series of 2^f = e^(f ln 2), |f| <= 1/2.
  float y = 1.52527338e-5f;
  y = y * f + 1.54035304e-4f;
  y = y * f + 1.33335581e-3f;
  y = y * f + 9.61812911e-3f;
  y = y * f + 5.55041087e-2f;
  y = y * f + 2.40226507e-1f;
  y = y * f + 6.93147181e-1f;
  y = y * f + 1.0f;
  uint32_t bits, whole;
  std::memcpy(&bits, &y, sizeof bits);
  std::memcpy(&whole, &shifted, sizeof whole);
  bits += whole << 23;
  std::memcpy(&y, &bits, sizeof bits);
  return x > -125.0f ? y : 0.0f;
}

// x = log2 (K diag(b)) of a row; its largest.
MOE_LAB_VECTORS float add_scale(const float* log_k, const float* log_b, int padded, float* x) {
  float best[kChunk];
  std::fill_n(best, kChunk, -kInfinity);
  for (int c = 0; c < padded; c += kChunk) {
    for (int i = 0; i < kChunk; ++i) {
      x[c + i] = log_k[c + i] + log_b[c + i];
      best[i] = x[c + i] > best[i] ? x[c + i] : best[i];
    }
  }
  return *std::max_element(best, best + kChunk);
}

// x becomes 2^(x - highest); their sum.
MOE_LAB_VECTORS float exponentiate(float* x, float highest, int padded) {
  float sums[kChunk] = {};
  for (int c = 0; c < padded; c += kChunk) {
    for (int i = 0; i < kChunk; ++i) sums[i] += x[c + i] = exp2_of(x[c + i] - highest);
  }
  float sum = 0.0f;
  for (int i = 0; i < kChunk; ++i) sum += sums[i];
  return sum;
}

MOE_LAB_VECTORS void add_shares(const float* x, float share, int padded, float* columns) {
  for (int e = 0; e < padded; ++e) columns[e] += x[e] * share;
}

struct Plan {
  const RouteArguments& a;
  const int padded;  // experts, with some of logit -inf
  const int64_t parts;
  std::vector<float> log_k, log_b, columns;  // [T, padded], [padded], [parts, padded]

  explicit Plan(const RouteArguments& a)
      : a(a), padded((a.E + kChunk - 1) / kChunk * kChunk), parts(std::clamp<int64_t>(a.T * padded / 16384, 1, 64)),
        log_k(a.T * padded, -kInfinity), log_b(padded, 0.0f), columns(parts * padded) {}

  // look(x, highest, columns) for each row: its log2 (K diag(b)), the largest of them, and its part's columns.
  template <class Look>
  void each_row(float none, Look look) {
    const int64_t each = (a.T + parts - 1) / parts;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      alignas(64) float x[kMaxExperts];
      for (int64_t part = first; part < last; ++part) {
        float* its = columns.data() + part * padded;
        std::fill_n(its, padded, none);
        for (int64_t t = part * each; t < std::min((part + 1) * each, a.T); ++t) {
          const float highest = add_scale(log_k.data() + t * padded, log_b.data(), padded, x);
          look(t, x, highest, its);
        }
      }
    });
  }

  void fill(float log2e_by_temperature) {
    torch::stable::parallel_for(0, a.T, std::max<int64_t>(1, 4096 / padded), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float* x = log_k.data() + t * padded;
        load(a, t, x);
        const float highest = *std::max_element(x, x + a.E);
        for (int e = 0; e < a.E; ++e) x[e] = std::max(x[e] - highest, -1e30f) * log2e_by_temperature;
      }
    });
  }

  // log2 of the plan's column sums, [E].
  std::vector<float> log_columns() {
    each_row(0.0f, [&](int64_t, float* x, float highest, float* its) {
      add_shares(x, 1.0f / exponentiate(x, highest, padded), padded, its);
    });
    std::vector<float> totals(a.E, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      for (int e = 0; e < a.E; ++e) totals[e] += columns[part * padded + e];
    }
    if (std::any_of(totals.begin(), totals.end(), [](float total) { return total < 1e-30f; }))
      return log_small_columns();
    for (float& total : totals) total = std::log2(total);
    return totals;
  }

  // The same where some are too small for a float: relative to the column's largest entry.
  std::vector<float> log_small_columns() {
    auto log_row = [&](const float* x, float highest) {
      float sum = 0.0f;
      for (int e = 0; e < a.E; ++e) sum += std::exp2(x[e] - highest);
      return highest + std::log2(sum);
    };
    std::vector<float> largest(a.E, -kInfinity), totals(a.E, 0.0f);
    each_row(-kInfinity, [&](int64_t, float* x, float highest, float* its) {
      const float log_sum = log_row(x, highest);
      for (int e = 0; e < a.E; ++e) its[e] = std::max(its[e], x[e] - log_sum);
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (int e = 0; e < a.E; ++e) largest[e] = std::max(largest[e], columns[part * padded + e]);
    }
    each_row(0.0f, [&](int64_t, float* x, float highest, float* its) {
      const float log_sum = log_row(x, highest);
      for (int e = 0; e < a.E; ++e) its[e] += std::exp2(x[e] - log_sum - largest[e]);
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (int e = 0; e < a.E; ++e) totals[e] += columns[part * padded + e];
    }
    for (int e = 0; e < a.E; ++e) totals[e] = largest[e] + std::log2(totals[e]);
    return totals;
  }
};

}  // namespace

void sinkhorn_cpu(const RouteArguments& a, const SinkhornArguments& s) {
  Plan plan(a);
  if (s.iters > 0) {
    plan.fill(s.log2e_by_temperature);
  } else {  // nothing is scaled: the logits are ranked
    for (int64_t t = 0; t < a.T; ++t) load(a, t, plan.log_k.data() + t * plan.padded);
  }
  const float log_share = std::log2(static_cast<float>(a.T) / a.E);
  for (int i = 0; i < s.iters; ++i) {
    const std::vector<float> totals = plan.log_columns();
    const bool is_near = std::all_of(totals.begin(), totals.end(), [&](float total) {
      return std::fabs(std::exp2(total - log_share) - 1.0f) <= s.tolerance;
    });
    if (s.tolerance > 0.0f && is_near) break;
    for (int e = 0; e < a.E; ++e) plan.log_b[e] += log_share - totals[e];
  }
  for (int e = 0; e < a.E; ++e) s.log_b[e] = plan.log_b[e] / kLog2e;

  plan.each_row(0.0f, [&](int64_t t, const float* x, float, float*) {
    alignas(64) float logits[kMaxExperts];
    alignas(64) uint32_t keys[kMaxExperts];
    uint32_t chunk_max[kMaxExperts / kChunk];
    int32_t* ids = a.ids + t * a.k;
    float* weights = a.weights + t * a.k;
    keys_of(x, a.E, plan.padded, keys, chunk_max);
    take_largest(keys, chunk_max, plan.padded / kChunk, a.k, ids);
    load(a, t, logits);
    float highest = -kInfinity, sum = 0.0f;
    for (int i = 0; i < a.k; ++i) highest = std::max(highest, logits[ids[i]]);
    for (int i = 0; i < a.k; ++i) sum += weights[i] = std::exp(logits[ids[i]] - highest);
    for (int i = 0; i < a.k; ++i) weights[i] /= sum;
  });
}

}  // namespace moe_lab
