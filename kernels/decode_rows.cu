// The product of a few rows with a matrix, at the rate at which the memory gives the matrix, and the norm ahead of it.
//
// As decode_gemv.cu, by tensor cores, so that more rows cost no more than one. A block takes eight rows of the matrix
// at a time, and its warps share their columns, 64 at a time. A thread copies for itself what it multiplies: 16 bytes
// of a row are two steps of products, whose 16 columns may be any, as long as x has the same ones. So no thread waits
// for another before a tile's sums are added up, and the ring never drains.
#include <algorithm>

#include "cuda.h"
#include "decode.cuh"
#include "decode.h"

namespace moe_lab {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStages = 6;
constexpr int kTile = 8;    // rows of the matrix
constexpr int kChunk = 64;  // columns, of which a thread has two times eight

struct Shared {
  uint4 ring[kWarps][kStages][2][32];
  float2 sums[2][kWarps][32];  // of a tile, by turns
  alignas(16) uint4 x[];       // the rows, `vectors` apart, and behind them the norm's weight
};

// Vectors of a row of x in shared memory: whole chunks, and half a line more, so that rows lie in other banks.
__host__ __device__ constexpr int vectors_of(int K) { return static_cast<int>(ceil_div(K, kChunk)) * kChunk / 8 + 4; }

// The rows of x into shared memory, a warp a row: with a norm x + residual, rounded, which one of the blocks also
// writes to `total`, and then normed. Missing columns are zeros.
template <class T>
__device__ __forceinline__ void take_rows(const GemvArguments& a, uint4* shared_x, const uint4* norm) {
  constexpr int kAtOnce = 8;  // vectors that a lane asks for before it needs one
  const int lane = threadIdx.x % 32, n = a.K / 8, vectors = vectors_of(a.K);
  for (int t = threadIdx.x / 32; t < a.T; t += kWarps) {
    uint4* const row = shared_x + t * vectors;
    const uint4* const x = static_cast<const uint4*>(a.x) + static_cast<int64_t>(t) * n;
    const uint4* const residual = static_cast<const uint4*>(a.residual) + static_cast<int64_t>(t) * n;
    uint4* const total = blockIdx.x == t % gridDim.x ? static_cast<uint4*>(a.total) : nullptr;
    float squares = 0.0f;
    for (int first = lane; first < vectors; first += 32 * kAtOnce) {
      uint4 sums[kAtOnce], more[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + 32 * j;
        sums[j] = i < n ? __ldcg(x + i) : uint4{};
        more[j] = i < n && a.residual != nullptr ? __ldcg(residual + i) : uint4{};
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + 32 * j;
        if (i >= vectors) break;
        if (a.residual != nullptr) sums[j] = add<T>(sums[j], more[j]);
        if (a.norm != nullptr) squares += sum_of_squares<T>(sums[j]);
        row[i] = sums[j];
        if (total != nullptr && i < n) total[static_cast<int64_t>(t) * n + i] = sums[j];
      }
    }
    if (a.norm == nullptr) continue;
    const float scale = rsqrtf(sum_of_warp(squares) / a.K + a.eps);
    for (int i = lane; i < n; i += 32) row[i] = scaled<T>(row[i], scale, norm[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const __grid_constant__ GemvArguments a) {
  extern __shared__ __align__(128) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
  const int tiles = static_cast<int>(ceil_div(a.N, kTile)), chunks = static_cast<int>(ceil_div(a.K, kChunk));
  const int vectors = vectors_of(a.K);
  uint4* const norm = shared.x + a.T * vectors;

  const uint32_t ring = shared_address(&shared.ring[warp][0][0][lane]);
  int next_tile = blockIdx.x, next_chunk = warp;  // what is asked for next
  const auto ask = [&](int stage) {
    if (next_tile < tiles && next_chunk < chunks) {
      const int n = next_tile * kTile + row;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = next_chunk * kChunk + 32 * half + 8 * part;
        const bool is_there = n < a.N && k < a.K;
        const T* const from = static_cast<const T*>(a.weight) + (is_there ? static_cast<int64_t>(n) * a.K + k : 0);
        copy_16(ring + (2 * stage + half) * 512, from, is_there ? 16 : 0);
      }
      if ((next_chunk += kWarps) >= chunks) next_chunk = warp, next_tile += gridDim.x;
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) ask(stage);
  if (a.norm != nullptr) {
    for (int i = threadIdx.x; i < a.K / 8; i += kThreads) norm[i] = __ldg(static_cast<const uint4*>(a.norm) + i);
    __syncthreads();
  }
  let_next_begin();
  wait_for_results_before();
  take_rows<T>(a, shared.x, norm);
  __syncthreads();

  // Lanes without a row of x use the last one; their results are dropped.
  const uint32_t x = shared_address(shared.x + min(row, a.T - 1) * vectors + part);
  int stage = 0, turn = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
    float2 sum = {};
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      wait_copies<kStages - 1>();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 w = load_shared(ring + (2 * stage + half) * 512);
        const uint4 v = load_shared(x + 16 * (chunk * (kChunk / 8) + 4 * half));
        multiply_16(sum, v.x, v.y, w.x, w.y, T());
        multiply_16(sum, v.z, v.w, w.z, w.w, T());
      }
      ask(stage);
      if (++stage == kStages) stage = 0;
    }
    shared.sums[turn][warp][lane] = sum;
    __syncthreads();  // and before a place is used again all have passed the next one
    const int t = threadIdx.x / kTile, n = tile * kTile + threadIdx.x % kTile;
    if (t < a.T && n < a.N) {
      const float* const from = reinterpret_cast<const float*>(shared.sums[turn][0] + t * 4 + n % kTile / 2);
      float y = a.bias == nullptr ? 0.0f : static_cast<float>(static_cast<const T*>(a.bias)[n]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) y += from[w * 64 + n % 2];
      static_cast<T*>(a.y)[static_cast<int64_t>(t) * a.N + n] = static_cast<T>(y);
    }
  }
}

}  // namespace

cudaError_t gemv_of_rows(const GemvArguments& a, const Device& device) {
  const size_t x_bytes = 16 * static_cast<size_t>(a.T * vectors_of(a.K) + (a.norm == nullptr ? 0 : a.K / 8));
  Launch how{std::min<int64_t>(device.multiprocessors, ceil_div(a.N, kTile)), kThreads, sizeof(Shared) + x_bytes};
  // Else blocks that begin beside the kernel before are two on some multiprocessors, and none on others.
  how.apart = true;
  return launch(a.dtype == Dtype::kBFloat16 ? rows_kernel<__nv_bfloat16> : rows_kernel<__half>, how, device, a);
}

}  // namespace moe_lab
