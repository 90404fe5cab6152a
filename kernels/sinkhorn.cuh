// Sinkhorn's plan (ops/sinkhorn.py) and the k best experts of each token in it, in one launch.
//
// A block keeps its rows of log2 K in shared memory, as far as they fit; the others it reads again. An iteration is one
// look at each row, whose share of every column is summed in registers, and one exchange of E numbers between the
// blocks, which all run at once and wait for each other. All sums are made in a fixed order, so every block finds the
// same columns, and every run.
#pragma once

#include <cooperative_groups.h>

#include "cuda.h"
#include "route_lanes.cuh"

namespace moe_lab {

constexpr int kSinkhornThreads = 512;
constexpr int kSinkhornWarps = kSinkhornThreads / 32;
constexpr float kLog2e = 1.442695041f;

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct Sum {
  static constexpr float kNone = 0.0f;
  __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};

struct Largest {
  static constexpr float kNone = -kInfinity;
  __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// The column sums of a block's rows and of all blocks', in shared memory. `columns`: E, padded to a power of two.
struct Columns {
  const int columns;
  float* const partials;   // [2, blocks, columns] in memory, for even and odd exchanges, or null: there is one block
  float* const totals;     // [columns]
  float* const warp_sums;  // [warps, columns + 1]: so that neighbouring lanes may read neighbouring warps'
  int exchanges = 0;

  static constexpr int floats(int columns) { return columns + kSinkhornWarps * (columns + 1); }

  __device__ Columns(int columns, float* partials, float* shared)
      : columns(columns), partials(partials), totals(shared), warp_sums(shared + columns) {}

  __device__ __forceinline__ float& of_warp(int warp, int e) const { return warp_sums[warp * (columns + 1) + e]; }

  // From all warps' sums of all blocks; update(e, total) by one thread for each column.
  template <class Combine, class Update>
  __device__ __forceinline__ void exchange(Combine combine, Update update) {
    float* all = partials + static_cast<int64_t>(exchanges++ % 2) * gridDim.x * columns;
    __syncthreads();
    const int quarter = threadIdx.x % 4;  // four neighbouring lanes share a column
    for (int first = 0; first < columns; first += kSinkhornThreads / 4) {
      const int e = first + threadIdx.x / 4, safe = min(e, columns - 1);
      float total = of_warp(quarter, safe);
#pragma unroll
      for (int warp = 4; warp < kSinkhornWarps; warp += 4) total = combine(total, of_warp(quarter + warp, safe));
      total = combine(total, __shfl_down_sync(kAll, total, 2, 4));
      total = combine(total, __shfl_down_sync(kAll, total, 1, 4));
      if (quarter != 0 || e >= columns) continue;
      if (partials == nullptr) {
        update(e, total);
      } else {
        all[blockIdx.x * columns + e] = total;
      }
    }
    if (partials == nullptr) return;
    cooperative_groups::this_grid().sync();
    const int parts = min(max(1, kSinkhornThreads / columns), kSinkhornWarps);  // threads that share a column
    for (int i = threadIdx.x; i < parts * columns; i += kSinkhornThreads) {
      constexpr int kAtOnce = 17;  // of an H200's 132 blocks with 64 columns a thread has as many
      float total = Combine::kNone, next[kAtOnce];
      for (int first = i / columns; first < gridDim.x; first += kAtOnce * parts) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int block = first + j * parts;
          next[j] = block < gridDim.x ? __ldcg(all + block * columns + i % columns) : Combine::kNone;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) total = combine(total, next[j]);
      }
      of_warp(i / columns, i % columns) = total;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < columns; e += kSinkhornThreads) {
      float total = of_warp(0, e);
      for (int part = 1; part < parts; ++part) total = combine(total, of_warp(part, e));
      update(e, total);
    }
  }
};

// The block's rows, for what is done rarely: by a warp each, any number of experts.
struct PlanRows {
  const RouteArguments& a;
  const SinkhornArguments& s;
  const int64_t begin;  // the block's first row
  const int rows, resident;
  const float* log_b;  // [columns], log2
  const float* log_k;  // [resident, columns], log2; a row's largest is 0, and -inf stands where there is no expert

  // Calls look(e, log2 (K diag(b))) for each expert of this lane.
  template <class Look>
  __device__ __forceinline__ void each_expert(int row, int columns, Look look) const {
    const int lane = threadIdx.x % 32;
    float highest = -kInfinity;
    if (row >= resident) {
      for (int e = lane; e < a.E; e += 32) highest = fmaxf(highest, load_one(a, begin + row, e));
      highest = max_lanes<32>(highest);
    }
    for (int e = lane; e < a.E; e += 32) {
      const float x = row < resident ? log_k[row * columns + e] : log2_k(s, load_one(a, begin + row, e), highest);
      look(e, x + log_b[e]);
    }
  }

  static __device__ __forceinline__ float log2_k(const SinkhornArguments& s, float logit, float highest) {
    return fmaxf(logit - highest, -1e30f) * s.log2e_by_temperature;
  }
};

// totals: log2 of the column sums where some are too small for a float: relative to the column's largest entry.
__device__ __noinline__ void sum_small_columns(PlanRows plan, Columns columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int turn = 0; turn < 2; ++turn) {
    __syncthreads();
    for (int e = lane; e < columns.columns; e += 32) columns.of_warp(warp, e) = turn == 0 ? -kInfinity : 0.0f;
    for (int row = warp; row < plan.rows; row += kSinkhornWarps) {
      float highest = -kInfinity, sum = 0.0f;
      plan.each_expert(row, columns.columns, [&](int, float x) { highest = fmaxf(highest, x); });
      highest = max_lanes<32>(highest);
      plan.each_expert(row, columns.columns, [&](int, float x) { sum += exp2_of(x - highest); });
      const float log_sum = highest + __log2f(sum_lanes<32>(sum));
      plan.each_expert(row, columns.columns, [&](int e, float x) {
        float& its = columns.of_warp(warp, e);
        its = turn == 0 ? fmaxf(its, x - log_sum) : its + exp2_of(x - log_sum - columns.totals[e]);
      });
    }
    if (turn == 0) {
      columns.exchange(Largest{}, [&](int e, float total) { columns.totals[e] = total; });
    } else {
      columns.exchange(Sum{}, [&](int e, float total) { columns.totals[e] += __log2f(total); });
    }
  }
  __syncthreads();
}

// Ids and weights of the k best of each row, for any k: a warp a row, k times the largest of what is left.
__device__ __noinline__ void choose_by_warps(PlanRows plan, Columns columns) {
  const RouteArguments& a = plan.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* left = reinterpret_cast<uint32_t*>(&columns.of_warp(warp, 0));
  for (int row = warp; row < plan.rows; row += kSinkhornWarps) {
    if (plan.s.iters > 0) {
      plan.each_expert(row, columns.columns, [&](int e, float x) { left[e] = ordered(x); });
    } else {  // nothing was scaled
      for (int e = lane; e < a.E; e += 32) left[e] = ordered(load_one(a, plan.begin + row, e));
    }
    int id = 0;
    for (int rank = 0; rank < a.k; ++rank) {
      uint32_t best = 0;
      int place = 0;
      for (int e = lane; e < a.E; e += 32) {
        if (left[e] > best) best = left[e], place = e;
      }
      const uint32_t highest = __reduce_max_sync(kAll, best);
      const int first = __reduce_min_sync(kAll, best == highest && best != 0 ? place : kMaxExperts);
      if (first % 32 == lane) left[first] = 0;
      if (rank == lane) id = first;
    }
    const float logit = lane < a.k ? load_one(a, plan.begin + row, id) : -kInfinity;
    const float highest = max_lanes<32>(logit), weight = __expf(logit - highest), sum = sum_lanes<32>(weight);
    if (lane < a.k) {
      a.ids[(plan.begin + row) * a.k + lane] = id;
      a.weights[(plan.begin + row) * a.k + lane] = __fdividef(weight, sum);
    }
    __syncwarp();
  }
}

// KP, LANES, VALUES: as LanesRow, by which a row is read and, up to KP (0: none) of them, the experts are chosen;
// E <= LANES * VALUES.
template <int KP, int LANES, int VALUES>
struct PlanBlock {
  using Row = LanesRow<KP == 0 ? VALUES : KP, LANES, VALUES, true>;
  static constexpr int kColumns = LANES * VALUES;
  static constexpr int kRows = 32 / LANES;  // that a warp looks at together
  static constexpr int kStep = kSinkhornWarps * kRows;
  static constexpr int kAtOnce = VALUES <= 8 ? 2 : 1;  // looks of a warp under way
  static constexpr float kWide = 60.0f;                // of scales up to 2^60 no row's sum is 0 or overflows
  static constexpr float kLogSmall = -100.0f;          // of a column's sum, below which a float loses parts of it

  const RouteArguments& a;
  const SinkhornArguments& s;
  const int64_t begin;  // the block's first row
  const int rows, resident;
  Columns columns;
  float* const log_b;   // [columns], log2
  float* const before;  // [columns], log_b of the iteration before
  float* const log_k;   // [resident, columns], as in PlanRows
  const Row row_kernel;
  const int in_warp, first_row;

  static constexpr size_t bytes(int64_t resident) {
    return (ceil_div(Columns::floats(kColumns), 4) * 4 + (2 + resident) * kColumns) * sizeof(float);
  }

  __device__ PlanBlock(const RouteArguments& a, const SinkhornArguments& s, float* shared, int64_t begin, int rows,
                       int resident)
      : a(a), s(s), begin(begin), rows(rows), resident(resident), columns(kColumns, s.partials, shared),
        log_b(shared + ceil_div(Columns::floats(kColumns), 4) * 4), before(log_b + kColumns), log_k(before + kColumns),
        row_kernel{a, static_cast<int>(threadIdx.x % LANES)}, in_warp(threadIdx.x % 32 / LANES),
        first_row(threadIdx.x / 32 * kRows) {}

  __device__ __forceinline__ int expert(int j) const { return row_kernel.expert(j); }

  // A lane without a row does the last again.
  __device__ __forceinline__ int row_of(int first) const { return min(first + in_warp, rows - 1); }

  __device__ __forceinline__ void load_logits(int row, float (&x)[VALUES]) const {
    if (a.aligned) {
      load_fours<VALUES>(a, begin + row, 4 * row_kernel.lane, 4 * LANES, x);
    } else {
#pragma unroll
      for (int j = 0; j < VALUES; ++j) {
        if (expert(j) < a.E) x[j] = load_one(a, begin + row, expert(j));
      }
    }
#pragma unroll
    for (int j = 0; j < VALUES; ++j) x[j] = expert(j) < a.E ? x[j] : -kInfinity;
  }

  __device__ __forceinline__ float highest_of(const float (&x)[VALUES]) const {
    float highest = x[0];
#pragma unroll
    for (int j = 1; j < VALUES; ++j) highest = fmaxf(highest, x[j]);
    return max_lanes<LANES>(highest);
  }

  // Logits become log2 K.
  __device__ __forceinline__ void take_log(float (&x)[VALUES]) const {
    const float highest = highest_of(x);
#pragma unroll
    for (int j = 0; j < VALUES; ++j) x[j] = expert(j) < a.E ? PlanRows::log2_k(s, x[j], highest) : -kInfinity;
  }

  // log2 (K diag(b)) of this lane's experts. The rows of one warp are all resident, or none.
  __device__ __forceinline__ void load(int row, const float (&b)[VALUES], float (&x)[VALUES]) const {
    if (row < resident) {
      const float4* from = reinterpret_cast<const float4*>(log_k + row * kColumns) + row_kernel.lane;
#pragma unroll
      for (int i = 0; i < VALUES / 4; ++i) {
        const float4 four = from[i * LANES];
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
      }
    } else {
      load_logits(row, x);
      take_log(x);
    }
#pragma unroll
    for (int j = 0; j < VALUES; ++j) x[j] += b[j];
  }

  __device__ __forceinline__ void load_scale(float (&b)[VALUES]) const {
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(log_b)[i * LANES + row_kernel.lane];
      b[4 * i] = four.x, b[4 * i + 1] = four.y, b[4 * i + 2] = four.z, b[4 * i + 3] = four.w;
    }
  }

  // log2 K of the resident rows.
  __device__ __forceinline__ void fill() const {
    constexpr int kLoads = VALUES <= 8 ? 4 : 32 / VALUES;
    for (int first = first_row; first < resident; first += kLoads * kStep) {
      float x[kLoads][VALUES];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) load_logits(row_of(first + i * kStep), x[i]);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        take_log(x[i]);
        if (first + i * kStep + in_warp >= resident) continue;
        float4* to = reinterpret_cast<float4*>(log_k + (first + i * kStep + in_warp) * kColumns) + row_kernel.lane;
#pragma unroll
        for (int j = 0; j < VALUES / 4; ++j)
          to[j * LANES] = {x[i][4 * j], x[i][4 * j + 1], x[i][4 * j + 2], x[i][4 * j + 3]};
      }
    }
  }

  // The warps' sums over their rows of each column of the plan. Only of wide scales is a row's largest entry looked
  // for.
  __device__ __forceinline__ void sum_rows(bool is_wide) const {
    float b[VALUES], sums[VALUES] = {};
    load_scale(b);
    for (int first = first_row; first < rows; first += kAtOnce * kStep) {
      float x[kAtOnce][VALUES], total[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) load(row_of(first + i * kStep), b, x[i]);
      if (is_wide) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float highest = highest_of(x[i]);
#pragma unroll
          for (int j = 0; j < VALUES; ++j) x[i][j] -= highest;
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < VALUES; ++j) x[i][j] = exp2_of(x[i][j]), total[i] += x[i][j];
      }
#pragma unroll
      for (int step = 1; step < LANES; step *= 2) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) total[i] += __shfl_xor_sync(kAll, total[i], step);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float share = first + i * kStep + in_warp < rows ? __fdividef(1.0f, total[i]) : 0.0f;
#pragma unroll
        for (int j = 0; j < VALUES; ++j) sums[j] += x[i][j] * share;
      }
    }
    sum_warp<LANES>(sums, 0);
  }

  // The sums of the warp's lanes of the same experts: of every two lanes each goes on with half of the values, so far
  // as there are halves.
  template <int STEP, int N>
  __device__ __forceinline__ void sum_warp(const float (&x)[N], int first) const {
    if constexpr (STEP == 32) {
#pragma unroll
      for (int j = 0; j < N; ++j) columns.of_warp(threadIdx.x / 32, expert(first + j)) = x[j];
    } else if constexpr (N == 1) {
      const float sum[1] = {x[0] + __shfl_xor_sync(kAll, x[0], STEP)};
      sum_warp<2 * STEP>(sum, first);
    } else {
      const bool takes_second = threadIdx.x & STEP;
      float sum[N / 2];
#pragma unroll
      for (int j = 0; j < N / 2; ++j) {
        const float given = takes_second ? x[j] : x[j + N / 2], kept = takes_second ? x[j + N / 2] : x[j];
        sum[j] = kept + __shfl_xor_sync(kAll, given, STEP);
      }
      sum_warp<2 * STEP>(sum, takes_second ? first + N / 2 : first);
    }
  }

  // Scales the columns once; whether they were already as near T/E as asked, and were left.
  __device__ __forceinline__ bool iterate(float log_share, bool& is_wide) {
    sum_rows(is_wide);
    bool is_odd = false, is_off = false;
    auto scale = [&](int e) {
      const float log_total = columns.totals[e], scaled = before[e] + log_share - log_total;
      log_b[e] = scaled;
      is_odd |= log_total < kLogSmall || fabsf(scaled) > kWide;
      is_off |= !(fabsf(exp2_of(log_total - log_share) - 1.0f) <= s.tolerance);
    };
    columns.exchange(Sum{}, [&](int e, float total) {
      columns.totals[e] = __log2f(total);
      before[e] = log_b[e];
      if (e < a.E) scale(e);
    });
    is_wide = __syncthreads_or(is_odd);
    if (is_wide) {
      bool is_small = false;
      for (int e = threadIdx.x; e < a.E; e += kSinkhornThreads) is_small |= columns.totals[e] < kLogSmall;
      if (__syncthreads_or(is_small)) {
        for (int e = threadIdx.x; e < a.E; e += kSinkhornThreads) log_b[e] = before[e];
        sum_small_columns(generic(), columns);
        is_off = false;
        for (int e = threadIdx.x; e < a.E; e += kSinkhornThreads) scale(e);
      }
      __syncthreads();
    }
    if (s.tolerance == 0.0f || __syncthreads_or(is_off)) return false;
    for (int e = threadIdx.x; e < a.E; e += kSinkhornThreads) log_b[e] = before[e];
    __syncthreads();
    return true;
  }

  __device__ __forceinline__ PlanRows generic() const { return {a, s, begin, rows, resident, log_b, log_k}; }

  __device__ __forceinline__ void choose_by_lanes() const {
    float b[VALUES];
    load_scale(b);
    for (int first = first_row; first < rows; first += kStep) {
      const int row = row_of(first);
      float x[VALUES];
      if (s.iters > 0) {
        load(row, b, x);
      } else {
        load_logits(row, x);  // nothing was scaled
      }
      // Ranked are powers of two, which are of one size; where they are not, their logarithms.
      const float top = highest_of(x);
      uint32_t powers[VALUES], exact[VALUES], best = 0;
#pragma unroll
      for (int j = 0; j < VALUES; ++j) {
        exact[j] = expert(j) < a.E ? ordered(x[j]) : 0;
        powers[j] = expert(j) < a.E && s.iters > 0 ? ordered(exp2_of(x[j] - top)) : exact[j];
        best = max(best, powers[j]);
      }
      int ids[Row::kMine];
      uint32_t chosen[Row::kMine];
      row_kernel.choose(powers, max_lanes<LANES>(best), exact, ids, chosen);
      float weights[Row::kMine], highest = -kInfinity, sum = 0.0f;
#pragma unroll
      for (int m = 0; m < Row::kMine; ++m) {
        weights[m] = row_kernel.is_mine(m) ? load_one(a, begin + row, ids[m]) : -kInfinity;
        highest = fmaxf(highest, weights[m]);
      }
      highest = max_lanes<LANES>(highest);
#pragma unroll
      for (int m = 0; m < Row::kMine; ++m) weights[m] = __expf(weights[m] - highest), sum += weights[m];
      sum = sum_lanes<LANES>(sum);
#pragma unroll
      for (int m = 0; m < Row::kMine; ++m) {
        if (first + in_warp >= rows || !row_kernel.is_mine(m)) continue;
        const int64_t at = (begin + row) * a.k + row_kernel.lane * Row::kMine + m;
        a.ids[at] = ids[m];
        a.weights[at] = __fdividef(weights[m], sum);
      }
    }
  }
};

template <int KP, int LANES, int VALUES>
__global__ void __launch_bounds__(kSinkhornThreads, 1)
    sinkhorn_kernel(const __grid_constant__ RouteArguments a, const __grid_constant__ SinkhornArguments s,
                    int rows_per_block, int resident) {
  extern __shared__ float4 sinkhorn_shared[];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int rows =
      static_cast<int>(max(min(static_cast<int64_t>(rows_per_block), a.T - begin), static_cast<int64_t>(0)));
  PlanBlock<KP, LANES, VALUES> block(a, s, reinterpret_cast<float*>(sinkhorn_shared), begin, rows, min(resident, rows));
  for (int e = threadIdx.x; e < LANES * VALUES; e += kSinkhornThreads) block.log_b[e] = 0.0f;
  __syncthreads();
  wait_for_kernels_before();
  if (s.iters > 0) block.fill();
  __syncthreads();  // a lane without a row looks at the last one, which another warp may have written
  const float log_share = __log2f(static_cast<float>(a.T) / a.E);
  bool is_wide = false;
  for (int i = 0; i < s.iters; ++i) {
    if (block.iterate(log_share, is_wide)) break;
  }
  if constexpr (KP > 0) {
    if (a.k <= KP) block.choose_by_lanes();
  }
  if (a.k > KP) choose_by_warps(block.generic(), block.columns);
  for (int e = threadIdx.x; e < a.E && blockIdx.x == 0; e += kSinkhornThreads) s.log_b[e] = block.log_b[e] / kLog2e;
}

}  // namespace moe_lab
