// A row of logits by one warp: K times the largest of what is left, found by one reduction of the hardware.
//
// For any E and K. Every lane holds VALUES neighbouring experts, sorted, so that a round looks at the lanes' first ones
// only; lanes are in the order of their experts, so that of equal values the lowest lane's is the lowest expert's.
#pragma once

#include "route.cuh"

namespace moe_lab {

// A bit for each of the row's groups: whether its experts may be chosen. `scratch`: what is ranked, [E], and
// space for a float for each group.
__device__ __forceinline__ uint32_t kept_groups(const RouteArguments& a, int lane, float* scratch) {
  const int size = a.group_size;
  float* group_scores = scratch + a.E;
  for (int g = lane; g < a.n_groups; g += 32) {
    uint32_t first = 0, second = 0;  // below every value's; NaN is the largest
    for (int e = g * size; e < (g + 1) * size; ++e) {
      const uint32_t its = ordered(scratch[e]);
      second = max(second, min(first, its));
      first = max(first, its);
    }
    group_scores[g] = a.group_top2 && size > 1 ? value_of(first) + value_of(second) : value_of(first);
  }
  __syncwarp();
  int better = lane < a.n_groups ? 0 : a.n_groups;
  const uint32_t mine = ordered(group_scores[min(lane, a.n_groups - 1)]);
  for (int other = 0; other < a.n_groups; ++other) {
    const uint32_t its = ordered(group_scores[other]);
    better += its > mine || (its == mine && other < lane);
  }
  return __ballot_sync(kAll, better < a.top_groups);
}

// e / size as a product, exact for e < 1024.
struct GroupOf {
  uint32_t reciprocal;
  __device__ explicit GroupOf(int size) : reciprocal(((1u << 22) + size - 1) / size) {}
  __device__ int operator()(int e) const { return e * reciprocal >> 22; }
};

// SCORES: scores may be ranked and groups limited; without, the logits are ranked.
template <int VALUES, bool SCORES>
struct WarpRow {
  const RouteArguments& a;
  const int lane;

  __device__ __forceinline__ int expert(int i) const { return lane * VALUES + i; }

  __device__ __forceinline__ void load(int64_t row, float (&x)[VALUES]) const {
    bool loaded = false;
    if constexpr (VALUES >= 4) {
      loaded = a.aligned;
      if (loaded) load_fours<VALUES>(a, row, expert(0), 4, x);
    }
    if (!loaded) {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        if (expert(i) < a.E) x[i] = load_one(a, row, expert(i));
      }
    }
  }

  // The sum of exp(x - highest) over the row.
  __device__ __forceinline__ float total(const float (&x)[VALUES], float highest) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) sum += expert(i) < a.E ? __expf(x[i] - highest) : 0.0f;
    return sum_lanes<32>(sum);
  }

  // Lane r gets the winner of rank r (r < k), its id and weight. `scratch`: with groups, E + n_groups floats.
  __device__ __forceinline__ void route(int64_t row, float* scratch, int& id, float& weight) const {
    float x[VALUES];
    load(row, x);
    float ranked[VALUES];
    float highest = -kInfinity, sum = 0.0f;
    const bool ranks_scores = SCORES && a.ranks_scores();
    if (ranks_scores && a.score == Score::kSoftmax) {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) highest = expert(i) < a.E ? fmaxf(highest, x[i]) : highest;
      highest = max_lanes<32>(highest);
      sum = total(x, highest);
      if (!(sum == sum)) highest = sum;  // a row without a softmax has weights of NaN
    }
    uint32_t keys[VALUES], sorted[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) ranked[i] = x[i];
    if (ranks_scores) scores_of<VALUES>(a.score, ranked, highest, sum);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      if (ranks_scores && a.bias != nullptr && expert(i) < a.E) ranked[i] += a.bias[expert(i)];
      keys[i] = expert(i) < a.E ? ordered(ranked[i]) : 0;  // 0: no expert
    }
    if (SCORES && a.grouped()) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        if (expert(i) < a.E) scratch[expert(i)] = ranked[i];
      }
      __syncwarp();
      const uint32_t kept = kept_groups(a, lane, scratch);
      const GroupOf group(a.group_size);
#pragma unroll
      for (int i = 0; i < VALUES; ++i) keys[i] = expert(i) < a.E && kept >> group(expert(i)) & 1 ? keys[i] : 0;
    }
#pragma unroll
    for (int i = 0; i < VALUES; ++i) sorted[i] = keys[i];
    sort(sorted);

    uint32_t taken = 0, mine = 0;
    float chosen = 0.0f;
#pragma unroll 2
    for (int rank = 0; rank < a.k; ++rank) {
      const uint32_t best = __reduce_max_sync(kAll, sorted[0]);
      const bool holds = sorted[0] == best;
      const uint32_t holders = __ballot_sync(kAll, holds);
      const int winner = __ffs(holders) - 1;
      int place = 0;
      if constexpr (VALUES > 1) {
#pragma unroll
        for (int i = VALUES - 1; i >= 0; --i) place = keys[i] == best && (taken >> i & 1) == 0 ? i : place;
      }
      if (lane == winner) {
        taken |= 1u << place;
#pragma unroll
        for (int i = 0; i + 1 < VALUES; ++i) sorted[i] = sorted[i + 1];
        sorted[VALUES - 1] = 0;
      }
      const int expert_id = __shfl_sync(kAll, expert(place), winner);
      if (lane == rank) id = expert_id, mine = best;
      if (!ranks_scores) {
        const float value = value_of(best);
        if (rank == 0) highest = value;
        chosen += a.score == Score::kSoftmax ? __expf(value - highest) : score_of(a.score, value, 0.0f, 1.0f);
      }
    }

    const bool is_winner = lane < a.k;
    const float logit = ranks_scores ? (is_winner ? load_one(a, row, id) : 0.0f) : value_of(mine);
    const bool softmax = a.score == Score::kSoftmax;
    weight = softmax ? __expf(logit - highest) : score_of(a.score, logit, 0.0f, 1.0f);
    if (a.renormalize) {
      if (ranks_scores) chosen = sum_lanes<32>(is_winner ? weight : 0.0f);
      weight = __fdividef(weight, not_zero(chosen));
    } else if (softmax) {
      weight = __fdividef(weight, ranks_scores ? sum : total(x, highest));
    }
    weight *= a.scale;
  }
};

}  // namespace moe_lab
