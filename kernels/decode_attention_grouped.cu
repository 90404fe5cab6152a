// Attention of one new token of each sequence, in one launch, where up to eight heads of queries share one of keys.
//
// As decode_attention.cu, by tensor cores. A cluster has a head of keys of a sequence. Its warps take the cached
// positions by turns, eight at a time, which is what an instruction multiplies with all queries: eight rows of its
// sixteen. For the values the other eight rows have the rest of each weight, which a rounded one of 16 bits leaves.
//
// What a lane multiplies it reads from shared memory 16 bytes at a time, as the products of a head and the columns of a
// sum may come in any order that is the same for both factors. So that the lanes of an instruction read from different
// banks, the chunks of 16 bytes of a row are stored in an order that depends on the row.
#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "cuda.h"
#include "decode_turn.cuh"

namespace moe_lab {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostBlocks = 16;  // of a cluster
constexpr int kKeys = 8;         // positions of a tile
constexpr int kStages = 2;       // at most 64 KB of a block: with more it begins later beside the projections' blocks

template <class T, int D>
struct Shared {
  // What a warp has read is what its sums take the place of.
  union Ring {
    T keys_and_values[kStages][2][kKeys * D];
    float4 acc[kMostQueries * D / 4];
  };
  alignas(128) Ring rings[kWarps];
  T new_key_and_value[2][kKeys * D];  // a tile of one position
  T q[kMostQueries * D];
  float best[kWarps][kMostQueries], total[kWarps][kMostQueries];
  // From each block of the cluster, of the acc its share.
  float best_of[kMostBlocks][kMostQueries], total_of[kMostBlocks][kMostQueries];
  float4 acc_of[kMostQueries * D / 4];
};

// d (16 x 8) += a (16 x 8) b (8 x 8). Lane 4 g + m has of d the columns 2 m and 2 m + 1 of rows g and g + 8.
#define MOE_LAB_MULTIPLY(T, NAME)                                                                      \
  __device__ __forceinline__ void multiply_8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, T) { \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                                          \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                                     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                               \
        : "r"(a0), "r"(a1), "r"(b));                                                                   \
  }
MOE_LAB_MULTIPLY(__nv_bfloat16, "bf16")
MOE_LAB_MULTIPLY(__half, "f16")

__device__ __forceinline__ void add_scaled(float4& sum, float by, const float4& part) {
  sum.x += by * part.x, sum.y += by * part.y, sum.z += by * part.z, sum.w += by * part.w;
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_kernel(const __grid_constant__ DecodeAttentionArguments a, int blocks) {
  constexpr int kChunks = D / 8, N = D / 32;  // of 16 bytes in a row; dimensions that a lane turns
  const int G = a.G;
  extern __shared__ __align__(128) uint8_t memory[];
  Shared<T, D>& shared = *reinterpret_cast<Shared<T, D>*>(memory);
  const auto cluster = cooperative_groups::this_cluster();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const int rank = blockIdx.x % blocks, heads = a.H / G, head = blockIdx.x / blocks % heads;
  const int64_t b = blockIdx.x / blocks / heads, before = b * a.cache_row + static_cast<int64_t>(head) * a.N * D;
  T* const keys = static_cast<T*>(a.k_cache) + before;
  T* const values = static_cast<T*>(a.v_cache) + before;

  auto all_have_begun = cluster.barrier_arrive();
  const int last = static_cast<int>(*a.position);
  const int stride = kKeys * kWarps * blocks;
  const int first = max(last - a.window + 1, 0) + kKeys * (rank * kWarps + warp);
  const auto ask = [&](int key, int stage) {
    const uint32_t to = shared_address(shared.rings[warp].keys_and_values[stage]);
    if (key < last) {
#pragma unroll
      for (int i = lane; i < kKeys * kChunks; i += 32) {
        const int row = i / kChunks, chunk = i % kChunks, bytes = key + row < last ? 16 : 0;
        const int64_t from = static_cast<int64_t>(key + row) * D + 8 * chunk;
        copy_16(to + 2 * row * D + 16 * (chunk ^ (4 * (row & 1))), keys + from, bytes);
        copy_16(to + 2 * (kKeys + row) * D + 16 * (chunk ^ row), values + from, bytes);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) ask(first + stage * stride, stage);
  // Warps turn the queries; of one block, also the new key, and take the new value. A warp has two of these at most.
  static_assert(kMostQueries + 2 <= 2 * kWarps);
  const bool has_new = rank == blocks - 1;
  const int items = has_new ? G + 2 : G;
  const T* rows[2];
  Turn<N> turns[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int item = warp + i * kWarps;
    if (item >= items) break;
    if (item <= G) turns[i].template load<T>(a, item < G ? a.q_norm : a.k_norm, item < G ? head * G + item : head);
    rows[i] = item < G    ? static_cast<const T*>(a.q) + b * a.q_row
              : item == G ? static_cast<const T*>(a.k) + b * a.k_row
                          : static_cast<const T*>(a.v) + b * a.v_row;
  }
  if (has_new)
    for (int i = D + threadIdx.x; i < kKeys * D; i += kThreads) shared.new_key_and_value[1][i] = static_cast<T>(0.0f);
  let_next_begin();
  wait_for_results_before();
  float x[2][N];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int item = warp + i * kWarps;
    if (item >= items) break;
    const T* const row = rows[i] + (item < G ? head * G + item : head) * D;
#pragma unroll
    for (int n = 0; n < N; ++n) x[i][n] = static_cast<float>(row[lane + 32 * n]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int item = warp + i * kWarps;
    if (item >= items) break;
    T y[N];
    if (item <= G) {
      turned<T>(y, x[i], a, rows[i], turns[i], item < G ? a.H : heads);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) y[n] = static_cast<T>(clamped(x[i][n], a.clip));
    }
    T* const to = item < G ? shared.q + item * D : shared.new_key_and_value[item - G];
    T* const cached = item == G ? keys : values;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      to[lane + 32 * n] = y[n];
      if (item >= G) cached[static_cast<int64_t>(last) * D + lane + 32 * n] = y[n];
    }
  }
  __syncthreads();

  // Lane 4 g + m has of query g the chunks m, m + 4, ...; which dimensions a product takes together is free.
  uint4 q[kChunks / 4];
#pragma unroll
  for (int j = 0; j < kChunks / 4; ++j)
    q[j] = group < G ? load_shared(shared_address(shared.q) + 2 * group * D + 16 * (member + 4 * j)) : uint4{};
  const float scale = a.scale * kLog2e;
  float best = -INFINITY, total = 0.0f, acc[kChunks / 8][8][4] = {};
  const auto take = [&](uint32_t from, int count) {
    float2 halves[2] = {};  // two chains of products
#pragma unroll
    for (int j = 0; j < kChunks / 4; ++j) {
      const uint4 k = load_shared(from + 2 * group * D + 16 * ((member + 4 * j) ^ (4 * (group & 1))));
      multiply_16(halves[0], q[j].x, q[j].y, k.x, k.y, T());
      multiply_16(halves[1], q[j].z, q[j].w, k.z, k.w, T());
    }
    float p[2] = {(halves[0].x + halves[1].x) * scale, (halves[0].y + halves[1].y) * scale};
#pragma unroll
    for (int e = 0; e < 2; ++e) p[e] = 2 * member + e < count ? p[e] : -INFINITY;
    const float before = best;
    float most = fmaxf(p[0], p[1]);
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
    best = fmaxf(best, fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2)));
    const float kept = exp2f(before - known(best));
#pragma unroll
    for (int e = 0; e < 2; ++e) p[e] = exp2f(p[e] - known(best));
    total = total * kept + p[0] + p[1];
    if (__any_sync(0xFFFFFFFFu, kept != 1.0f)) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[c / 8][c % 8][e] *= kept;
    }
    // A weight is the sum of two of 16 bits; the second takes the rows of queries that are not there.
    const uint32_t high = pack(p[0], p[1], T());
    const float2 rounded = two(high, T());
    const uint32_t low = pack(p[0] - rounded.x, p[1] - rounded.y, T());
#pragma unroll
    for (int c = 0; c < kChunks / 8; ++c) {
      const int chunk = group + 8 * c, row = 2 * member;
      const uint32_t at = from + 2 * kKeys * D;
      const uint4 u = load_shared(at + 2 * row * D + 16 * (chunk ^ row));
      const uint4 v = load_shared(at + 2 * (row + 1) * D + 16 * (chunk ^ (row + 1)));
      const uint32_t us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        multiply_8(acc[c][i], high, low, __byte_perm(us[i / 2], vs[i / 2], i % 2 == 0 ? 0x5410 : 0x7632), T());
    }
  };

  int stage = 0;
  for (int key = first; key < last; key += stride) {
    wait_copies<kStages - 1>();
    __syncwarp();
    take(shared_address(shared.rings[warp].keys_and_values[stage]), last - key);
    __syncwarp();  // the stage is read
    ask(key + kStages * stride, stage);
    if (++stage == kStages) stage = 0;
  }
  if (has_new && warp == kWarps - 1) take(shared_address(shared.new_key_and_value), 1);  // whose turns end first

#pragma unroll
  for (int s = 1; s < 4; s *= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, s);
  if (member == 0) shared.best[warp][group] = best, shared.total[warp][group] = total;
  __syncwarp();  // the last tile is read
  // Vector 32 v + lane has of query lane / 4 the dimensions from place(v, lane) on.
  constexpr int kVectors = kChunks / 2;
  static_assert(kMostBlocks <= 4 * kVectors, "each block is told by a lane");
  const auto place = [](int v, int lane) { return 8 * (2 * (lane % 4) + v / 2 % 2 + 8 * (v / 4)) + v % 2 * 4; };
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float4 sums;
    float* const of = reinterpret_cast<float*>(&sums);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& parts = acc[v / 4][v % 2 * 4 + i];
      const float high = parts[v / 2 % 2], low = parts[v / 2 % 2 + 2];
      of[i] = isfinite(low) ? high + low : high;  // infinite values: the low weight may be 0
    }
    shared.rings[warp].acc[32 * v + lane] = sums;
  }
  __syncthreads();
  // The warps of a block. Each block of the cluster is given its share of the vectors.
  cluster.barrier_wait(std::move(all_have_begun));
  const int share = 32 * kVectors / blocks;
  if (threadIdx.x < 32 * kVectors && group < G) {
    float best = -INFINITY, kept[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) best = fmaxf(best, kept[w] = shared.best[w][group]);
    float total = 0.0f;
    float4 sums = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      kept[w] = exp2f(kept[w] - known(best));
      total += kept[w] * shared.total[w][group];
      add_scaled(sums, kept[w], shared.rings[w].acc[threadIdx.x]);
    }
    cluster.map_shared_rank(&shared, threadIdx.x / share)->acc_of[rank * share + threadIdx.x % share] = sums;
    if (const int r = 4 * warp + member; r < blocks) {  // each block is told by another member of the query
      Shared<T, D>& to = *cluster.map_shared_rank(&shared, r);
      to.best_of[rank][group] = best, to.total_of[rank][group] = total;
    }
  }
  cluster.sync();
  const int vector = rank * share + threadIdx.x, query = vector % 32 / 4;
  if (threadIdx.x < share && query < G) {
    const float sink =
        a.sinks == nullptr ? -INFINITY : static_cast<float>(static_cast<const T*>(a.sinks)[head * G + query]) * kLog2e;
    float best = sink, kept[kMostBlocks];
#pragma unroll
    for (int r = 0; r < kMostBlocks; ++r) {
      kept[r] = r < blocks ? shared.best_of[r][query] : -INFINITY;
      best = fmaxf(best, kept[r]);
    }
    float total = exp2f(sink - best);
    float4 sums = {};
#pragma unroll
    for (int r = 0; r < kMostBlocks; ++r) {
      if (r >= blocks) break;
      kept[r] = exp2f(kept[r] - best);
      total += kept[r] * shared.total_of[r][query];
      add_scaled(sums, kept[r], shared.acc_of[r * share + threadIdx.x]);
    }
    const float scale = 1.0f / total;
    T* const y = static_cast<T*>(a.y) + (b * a.H + head * G + query) * D + place(vector / 32, vector % 32);
    *reinterpret_cast<uint2*>(y) = {pack(sums.x * scale, sums.y * scale, T()),
                                    pack(sums.z * scale, sums.w * scale, T())};
  }
}

template <class T, int D>
cudaError_t run(const DecodeAttentionArguments& a, const Device& device) {
  const int pairs = a.B * a.H / a.G, most = std::min(kMostBlocks, device.cluster);
  int blocks = 1;
  while (2 * blocks <= most && 2 * blocks * pairs <= device.multiprocessors) blocks *= 2;
  const int64_t all = static_cast<int64_t>(pairs) * blocks;
  return launch(grouped_kernel<T, D>, {all, kThreads, sizeof(Shared<T, D>), blocks}, device, a, blocks);
}

template <class T>
cudaError_t run(const DecodeAttentionArguments& a, const Device& device) {
  return (a.d == 64 ? run<T, 64> : run<T, 128>)(a, device);
}

}  // namespace

cudaError_t decode_attention_grouped(const DecodeAttentionArguments& a, const Device& device) {
  return (a.dtype == Dtype::kBFloat16 ? run<__nv_bfloat16> : run<__half>)(a, device);
}

}  // namespace moe_lab
