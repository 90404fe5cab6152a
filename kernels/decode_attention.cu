// Attention of one new token of each sequence, in one launch: queries and keys are normed, clamped and turned, key and
// value go into the cache, and softmax(scale q k^T) v is computed over the cached positions. Here each head of queries
// has one of keys; decode_attention_grouped.cu is for heads that share keys.
//
// A cluster has a head of a sequence. Its warps take the cached positions by turns, eight at a time, into rings of
// their own: the first ones before they wait for the projections, which write none of them. Eight lanes share a
// position, each an eighth of the head, and keep a softmax of their own. At the end the sums of the warps are put
// together, then those of the blocks, each of which does so for its share of the head.
#include <cooperative_groups.h>

#include <utility>

#include "cuda.h"
#include "decode.h"
#include "decode_turn.cuh"

namespace moe_lab {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostBlocks = 8;  // of a cluster
constexpr int kTeam = 8;        // lanes that share a position
constexpr int kTeams = 32 / kTeam;
constexpr int kKeys = 8;  // positions of a stage
constexpr int kEach = kKeys / kTeams;

template <class T, int D, int kStages>
struct Shared {
  // What a warp has read is what its sums take the place of.
  union Ring {
    T keys_and_values[kStages][2][kKeys * D];
    struct {
      float best, total, acc[D];
    } sums;
  };
  alignas(128) Ring rings[kWarps];
  uint64_t full[kWarps][kStages];
  float q[D];
  float k[D], v[D];  // of the new token, as the cache has them
  // From each block of the cluster, of the acc its share of the dimensions.
  float best[kMostBlocks], total[kMostBlocks], acc[D];
};

template <class T, int D, int kStages>
__global__ void __launch_bounds__(kThreads, 2)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionArguments a, int blocks) {
  constexpr int kPieces = D / (8 * kTeam);  // of 16 bytes that a lane has of a position
  constexpr int N = 8 * kPieces;
  extern __shared__ __align__(128) uint8_t memory[];
  Shared<T, D, kStages>& shared = *reinterpret_cast<Shared<T, D, kStages>*>(memory);
  const auto cluster = cooperative_groups::this_cluster();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = lane / kTeam, member = lane % kTeam;
  const int rank = blockIdx.x % blocks, head = blockIdx.x / blocks % a.H;
  const int64_t b = blockIdx.x / blocks / a.H, before = b * a.cache_row + static_cast<int64_t>(head) * a.N * D;
  T* const keys = static_cast<T*>(a.k_cache) + before;
  T* const values = static_cast<T*>(a.v_cache) + before;

  auto all_have_begun = cluster.barrier_arrive();
  const uint32_t full = shared_address(shared.full[warp]);
  if (lane < kStages) Barrier{full + 8 * lane}.init(1);
  fence_barriers();
  __syncwarp();
  const int last = static_cast<int>(*a.position);
  const int stride = kKeys * kWarps * blocks;
  const int first = max(last - a.window + 1, 0) + kKeys * (rank * kWarps + warp);
  const auto ask = [&](int key, int stage) {
    if (key >= last || lane > 0) return;
    const int count = min(kKeys, last - key) * D;
    const Barrier barrier{full + 8 * stage};
    T(*const to)[kKeys * D] = shared.rings[warp].keys_and_values[stage];
    barrier.arrive_and_expect(2 * count * sizeof(T));
    load_bytes(shared_address(to[0]), keys + static_cast<int64_t>(key) * D, count * sizeof(T), barrier, kStay);
    load_bytes(shared_address(to[1]), values + static_cast<int64_t>(key) * D, count * sizeof(T), barrier, kStay);
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) ask(first + stage * stride, stage);
  // A warp turns the query; of one block others turn the new key and take the new value.
  const bool has_new = rank == blocks - 1, is_key = warp == 1 && has_new, is_value = warp == 2 && has_new;
  Turn<D / 32> turn;
  if (warp == 0) turn.template load<T>(a, a.q_norm, head);
  if (is_key) turn.template load<T>(a, a.k_norm, head);
  let_next_begin();
  wait_for_results_before();
  const auto turn_own = [&](T(&y)[D / 32], const T* row) {
    float x[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[i] = static_cast<float>(row[head * D + lane + 32 * i]);
    turned<T>(y, x, a, row, turn, a.H);
  };
  T y[D / 32];
  if (warp == 0) {
    turn_own(y, static_cast<const T*>(a.q) + b * a.q_row);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) shared.q[lane + 32 * i] = static_cast<float>(y[i]) * (a.scale * kLog2e);
  } else if (is_key) {
    turn_own(y, static_cast<const T*>(a.k) + b * a.k_row);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      shared.k[lane + 32 * i] = static_cast<float>(y[i]);
      keys[static_cast<int64_t>(last) * D + lane + 32 * i] = y[i];
    }
  } else if (is_value) {
    const T* const row = static_cast<const T*>(a.v) + b * a.v_row + head * D;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const T v = static_cast<T>(clamped(static_cast<float>(row[lane + 32 * i]), a.clip));
      shared.v[lane + 32 * i] = static_cast<float>(v);
      values[static_cast<int64_t>(last) * D + lane + 32 * i] = v;
    }
  }
  __syncthreads();

  float q[N];
#pragma unroll
  for (int n = 0; n < N; ++n) q[n] = shared.q[(n / 8 * kTeam + member) * 8 + n % 8];
  float best = -INFINITY, total = 0.0f, acc[N] = {};  // the team's softmax, and a member's part of its sum
  const auto score_of = [&](const float (&k)[N]) {
    float score = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) score = fmaf(q[n], k[n], score);
#pragma unroll
    for (int s = kTeam / 2; s > 0; s /= 2) score += __shfl_xor_sync(0xFFFFFFFFu, score, s);
    return score;
  };
  const auto take = [&](auto& scores, const auto& v) {
    constexpr int COUNT = sizeof(scores) / sizeof(float);
    const float before = best;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) best = fmaxf(best, scores[u]);
    const float kept = exp2f(before - known(best));
    total *= kept;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) total += scores[u] = exp2f(scores[u] - known(best));
#pragma unroll
    for (int n = 0; n < N; ++n) {
      acc[n] *= kept;
#pragma unroll
      for (int u = 0; u < COUNT; ++u) acc[n] = fmaf(scores[u], v[u][n], acc[n]);
    }
  };

  int stage = 0;
  uint32_t parity = 0;
  for (int key = first; key < last; key += stride) {
    Barrier{full + 8 * stage}.wait(parity);
    const uint32_t from = shared_address(shared.rings[warp].keys_and_values[stage]);
    float scores[kEach], k[N], v[kEach][N];
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const int at = team + kTeams * u;
      const bool is_there = key + at < last;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const uint32_t offset = 2 * (at * D + (p * kTeam + member) * 8);
        unpack<T>(k + 8 * p, is_there ? load_shared(from + offset) : uint4{});
        unpack<T>(v[u] + 8 * p, is_there ? load_shared(from + offset + 2 * kKeys * D) : uint4{});
      }
      const float score = score_of(k);
      scores[u] = is_there ? score : -INFINITY;
    }
    __syncwarp();  // the stage is read
    ask(key + kStages * stride, stage);
    if (++stage == kStages) stage = 0, parity ^= 1;
    take(scores, v);
  }
  if (has_new && warp == kWarps - 1) {  // whose turns end first
    float scores[1], k[N], v[1][N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int at = (n / 8 * kTeam + member) * 8 + n % 8;
      k[n] = shared.k[at];
      v[0][n] = team == 0 ? shared.v[at] : 0.0f;  // the others have no such key, and 0 times infinity is NaN
    }
    const float score = score_of(k);
    scores[0] = team == 0 ? score : -INFINITY;
    take(scores, v);
  }

  // The teams of a warp.
#pragma unroll
  for (int s = kTeam; s < 32; s *= 2) {
    const float before = best;
    best = fmaxf(best, __shfl_xor_sync(0xFFFFFFFFu, best, s));
    const float kept = exp2f(before - known(best));
    total *= kept;
    total += __shfl_xor_sync(0xFFFFFFFFu, total, s);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      acc[n] *= kept;
      acc[n] += __shfl_xor_sync(0xFFFFFFFFu, acc[n], s);
    }
  }
  auto& mine = shared.rings[warp].sums;
  if (lane == 0) mine.best = best, mine.total = total;
  if (team == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) mine.acc[(n / 8 * kTeam + member) * 8 + n % 8] = acc[n];
  }
  __syncthreads();
  // The warps of a block. Each block of the cluster is given its share of the dimensions.
  cluster.barrier_wait(std::move(all_have_begun));
  const int share = D / blocks, i = threadIdx.x;
  if (i < D) {
    float best = -INFINITY, total = 0.0f, acc = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) best = fmaxf(best, shared.rings[w].sums.best);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float kept = exp2f(shared.rings[w].sums.best - known(best));
      total += kept * shared.rings[w].sums.total, acc += kept * shared.rings[w].sums.acc[i];
    }
    Shared<T, D, kStages>& to = *cluster.map_shared_rank(&shared, i / share);
    to.acc[rank * share + i % share] = acc;
    if (i % share == 0) to.best[rank] = best, to.total[rank] = total;
  }
  cluster.sync();
  if (i < share) {
    const float sink =
        a.sinks == nullptr ? -INFINITY : static_cast<float>(static_cast<const T*>(a.sinks)[head]) * kLog2e;
    float best = sink, acc = 0.0f;
#pragma unroll
    for (int r = 0; r < kMostBlocks; ++r) best = r < blocks ? fmaxf(best, shared.best[r]) : best;
    float total = exp2f(sink - best);
#pragma unroll
    for (int r = 0; r < kMostBlocks; ++r) {
      if (r < blocks) {
        const float kept = exp2f(shared.best[r] - best);
        total += kept * shared.total[r], acc += kept * shared.acc[r * share + i];
      }
    }
    static_cast<T*>(a.y)[(b * a.H + head) * D + rank * share + i] = static_cast<T>(acc / total);
  }
}

template <class T, int D, int kStages>
cudaError_t run(const DecodeAttentionArguments& a, const Device& device, int blocks) {
  const int64_t all = static_cast<int64_t>(a.B) * a.H * blocks;
  return launch(decode_attention_kernel<T, D, kStages>, {all, kThreads, sizeof(Shared<T, D, kStages>), blocks}, device,
                a, blocks);
}

// A block that cannot begin beside the projections' asks for its first positions late, and the query waits behind
// these. Of one sequence those are three blocks a multiprocessor (decode_gemv.cu), of which the first one to end leaves
// room for two stages; of more they are one (decode_rows.cu), which leaves room for three.
template <class T, int D>
cudaError_t run(const DecodeAttentionArguments& a, const Device& device) {
  int blocks = 1;
  while (blocks < kMostBlocks && 2 * blocks * a.B * a.H <= device.multiprocessors) blocks *= 2;
  return a.B == 1 ? run<T, D, 2>(a, device, blocks) : run<T, D, 3>(a, device, blocks);
}

template <class T>
cudaError_t run(const DecodeAttentionArguments& a, const Device& device) {
  return (a.d == 64 ? run<T, 64> : run<T, 128>)(a, device);
}

}  // namespace

cudaError_t decode_attention(const DecodeAttentionArguments& a, const Device& device) {
  return (a.dtype == Dtype::kBFloat16 ? run<__nv_bfloat16> : run<__half>)(a, device);
}

}  // namespace moe_lab
