// Rows of logits by a few neighbouring lanes each, held in registers.
//
// Ranked are keys of 32 bits, so that one min and one max order value and index together: above the expert's index
// stands how far the value's bits lie above a base, and the base so far below the row's largest value that this fits.
// That is exact for values down to 1/4 of the largest at 256 experts, 1/16 at 128, 1/256 at 64; a warp with a row that
// chooses one further down ranks again by keys of 64 bits.
#pragma once

#include "route.cuh"

namespace moe_lab {

constexpr int log2_ceil(int n) { return n <= 1 ? 0 : 1 + log2_ceil((n + 1) / 2); }

// KP: the keys kept, a power of two, k at most; LANES share a row of VALUES each, E = LANES * VALUES.
// SCORES: scores may be ranked and groups limited; without, the logits are ranked.
template <int KP, int LANES, int VALUES, bool SCORES>
struct LanesRow {
  static constexpr int kIndexBits = log2_ceil(LANES * VALUES);
  static constexpr uint32_t kIndex = (1u << kIndexBits) - 1;
  static constexpr uint32_t kSpan = 0xffffffffu >> kIndexBits;
  static constexpr int kMine = KP > LANES ? KP / LANES : 1;  // winners whose weights a lane computes

  const RouteArguments& a;
  const int lane;  // among those of the row

  // Four neighbouring experts in each load, the lanes' loads side by side.
  __device__ __forceinline__ int expert(int j) const { return j / 4 * (LANES * 4) + lane * 4 + j % 4; }

  __device__ __forceinline__ bool is_mine(int m) const { return lane * kMine + m < a.k; }

  // The sum of exp(x - highest) over the row.
  __device__ __forceinline__ float total(const float (&x)[VALUES], float highest) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < VALUES; ++j) sum += __expf(x[j] - highest);
    return sum_lanes<LANES>(sum);
  }

  // A group's experts must be those of neighbouring lanes in one load.
  static bool fits_groups(const RouteArguments& a) {
    const int size = a.group_size;
    return !a.grouped() || (size >= 4 && size <= 4 * LANES && (size & (size - 1)) == 0);
  }

  // Zeroes the values of all but the best groups: no value's bits are zero (`ordered`).
  __device__ __forceinline__ void limit_groups(uint32_t (&values)[VALUES]) const {
    constexpr int kLoads = VALUES / 4;
    const int lanes = a.group_size / 4, log2_lanes = __ffs(lanes) - 1;  // lanes of a group
    uint32_t first[kLoads], second[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t* x = values + 4 * i;
      const uint32_t left = max(x[0], x[1]), right = max(x[2], x[3]);
      first[i] = max(left, right);
      second[i] = left > right ? max(min(x[0], x[1]), right) : max(min(x[2], x[3]), left);
    }
    for (int step = 1; step < lanes; step *= 2) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint32_t its_first = __shfl_xor_sync(kAll, first[i], step),
                       its_second = __shfl_xor_sync(kAll, second[i], step);
        second[i] = max(min(first[i], its_first), max(second[i], its_second));
        first[i] = max(first[i], its_first);
      }
    }
    uint32_t scores[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      scores[i] = a.group_top2 ? ordered(value_of(first[i]) + value_of(second[i])) : first[i];
    }
    const int mine = lane >> log2_lanes;
    int better[kLoads] = {};
    for (int group = 0; group < LANES >> log2_lanes; ++group) {
#pragma unroll
      for (int other = 0; other < kLoads; ++other) {
        const uint32_t its = __shfl_sync(kAll, scores[other], group << log2_lanes, LANES);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const bool is_before = other < i || (other == i && group < mine);
          better[i] += its > scores[i] || (its == scores[i] && is_before);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < VALUES; ++j) values[j] = better[j / 4] < a.top_groups ? values[j] : 0;
  }

  // The KP best keys of the row, descending, in every lane.
  template <class Key>
  __device__ __forceinline__ void rank(const uint32_t (&values)[VALUES], uint32_t base, Key (&best)[KP]) const {
#pragma unroll
    for (int first = 0; first < VALUES; first += KP) {
      Key chunk[KP];
#pragma unroll
      for (int i = 0; i < KP; ++i) {
        const int j = first + i;
        // Within a lane the place of a value orders as its expert does; the lane's part of the index comes in later.
        const uint32_t place = kIndex ^ (j / 4 * (LANES * 4) + j % 4);
        chunk[i] = (static_cast<Key>(max(values[j], base) - base) << kIndexBits) + place;
      }
      sort(chunk);
      if (first == 0) {
#pragma unroll
        for (int i = 0; i < KP; ++i) best[i] = chunk[i];
      } else {
        merge(best, chunk);
      }
    }
#pragma unroll
    for (int i = 0; i < KP; ++i) best[i] ^= lane * 4;
    merge_lanes<LANES>(best);
  }

  // This lane's winners among the row's: their ids, and how far their values lie above the base.
  template <class Key>
  __device__ __forceinline__ void take_mine(const Key (&best)[KP], int (&ids)[kMine], uint32_t (&above)[kMine]) const {
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      Key key = 0;  // by masks: a choice between elements of an array would put the array into memory
#pragma unroll
      for (int i = 0; i * kMine + m < KP; ++i) key |= best[i * kMine + m] & -static_cast<Key>(lane == i);
      ids[m] = static_cast<int>(kIndex - (static_cast<uint32_t>(key) & kIndex));
      above[m] = static_cast<uint32_t>(key >> kIndexBits);
    }
  }

  // This lane's winners among the row's, whose largest value is `largest` in every lane: their ids and values. `exact`:
  // what is ranked, and told, where a winner lies too far down.
  __device__ __forceinline__ void choose(const uint32_t (&values)[VALUES], uint32_t largest,
                                         const uint32_t (&exact)[VALUES], int (&ids)[kMine],
                                         uint32_t (&chosen)[kMine]) const {
    uint32_t base = max(largest, kSpan) - kSpan;
    {
      uint32_t best[KP];
      rank(values, base, best);
      take_mine(best, ids, chosen);
    }
    bool below = false;
#pragma unroll
    for (int m = 0; m < kMine; ++m) below |= is_mine(m) && chosen[m] == 0;
    if (__any_sync(kAll, below)) {
      base = 0;
      unsigned long long best[KP];
      rank(exact, base, best);
      take_mine(best, ids, chosen);
    }
#pragma unroll
    for (int m = 0; m < kMine; ++m) chosen[m] += base;
  }

  // Ids and weights of this lane's winners.
  __device__ __forceinline__ void route(int64_t row, int (&ids)[kMine], float (&weights)[kMine]) const {
    float x[VALUES];
    load_fours<VALUES>(a, row, 4 * lane, 4 * LANES, x);
    const bool ranks_scores = SCORES && a.ranks_scores(), softmax = a.score == Score::kSoftmax;
    float highest = 0.0f, sum = 1.0f;
    if (ranks_scores && softmax) {
      highest = x[0];
#pragma unroll
      for (int j = 1; j < VALUES; ++j) highest = fmaxf(highest, x[j]);
      highest = max_lanes<LANES>(highest);
      sum = total(x, highest);
      if (!(sum == sum)) highest = sum;  // a row without a softmax has weights of NaN
    }
    uint32_t values[VALUES];
    uint32_t largest = 0;
    if (ranks_scores) {
      float scores[VALUES];
#pragma unroll
      for (int j = 0; j < VALUES; ++j) scores[j] = x[j];
      scores_of<VALUES>(a.score, scores, highest, sum);
      if (a.bias != nullptr) {
#pragma unroll
        for (int j = 0; j < VALUES; j += 4) {
          const float4 four = *reinterpret_cast<const float4*>(a.bias + expert(j));
          scores[j] += four.x, scores[j + 1] += four.y, scores[j + 2] += four.z, scores[j + 3] += four.w;
        }
      }
#pragma unroll
      for (int j = 0; j < VALUES; ++j) values[j] = ordered(scores[j]);
    } else {
#pragma unroll
      for (int j = 0; j < VALUES; ++j) values[j] = ordered(x[j]);
    }
    if (SCORES && a.grouped()) limit_groups(values);
#pragma unroll
    for (int j = 0; j < VALUES; ++j) largest = max(largest, values[j]);
    largest = max_lanes<LANES>(largest);

    uint32_t chosen_values[kMine];
    choose(values, largest, values, ids, chosen_values);

    float logits[kMine], chosen = 0.0f;
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      logits[m] = ranks_scores ? (is_mine(m) ? load_one(a, row, ids[m]) : 0.0f) : value_of(chosen_values[m]);
    }
    if (softmax && !ranks_scores) highest = value_of(largest);
#pragma unroll
    for (int m = 0; m < kMine; ++m) weights[m] = logits[m];
    scores_of<kMine>(a.score, weights, highest, 1.0f);
#pragma unroll
    for (int m = 0; m < kMine; ++m) chosen += is_mine(m) ? weights[m] : 0.0f;
    float divisor = 1.0f;
    if (a.renormalize) {
      divisor = not_zero(sum_lanes<LANES>(chosen));
    } else if (softmax) {
      divisor = ranks_scores ? sum : total(x, highest);
    }
#pragma unroll
    for (int m = 0; m < kMine; ++m) weights[m] = a.scale * __fdividef(weights[m], divisor);
  }
};

}  // namespace moe_lab
