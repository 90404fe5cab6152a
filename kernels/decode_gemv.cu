// The product of one row with a matrix, at the rate at which the memory gives the matrix, and the norm ahead of it.
//
// A warp takes two rows of the matrix at once. It has a ring of stages of its own and asks for the next part of the
// rows as it empties one: for the first ones before it waits for the kernels that compute x, so that the memory has
// something to do meanwhile. Every block norms all of x for itself, which is cheaper than another launch.
#include <algorithm>

#include "cuda.h"
#include "decode.cuh"
#include "decode.h"

namespace moe_lab {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStages = 2;
constexpr int kBlocks = 3;       // of a multiprocessor, at most: no more would have room
constexpr int kPart = 1024;      // elements of each of the two rows of a stage
constexpr int kRow = 2 * kPart;  // bytes
constexpr int kAtOnce = 256;     // elements that a warp multiplies at once, 16 bytes a lane
constexpr int kMostOfThread = kMostColumns / (8 * kThreads);

struct Shared {
  uint8_t ring[kWarps][kStages][2 * kRow];
  uint64_t full[kWarps][kStages];
  float squares[kWarps];
  alignas(16) uint4 x[];  // [K / 8]
};

// x + residual, rounded, into shared memory and by block 0 into `total`; then normed. What shared memory holds before
// is the norm's weight.
template <class T>
__device__ __forceinline__ void norm_row(const GemvArguments& a, Shared& shared) {
  uint4 sums[kMostOfThread];
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kMostOfThread; ++j) {
    const int i = threadIdx.x + j * kThreads;
    if (i >= a.K / 8) break;
    sums[j] = __ldcg(static_cast<const uint4*>(a.x) + i);
    if (a.residual != nullptr) sums[j] = add<T>(sums[j], __ldcg(static_cast<const uint4*>(a.residual) + i));
    squares += sum_of_squares<T>(sums[j]);
    if (blockIdx.x == 0) static_cast<uint4*>(a.total)[i] = sums[j];
  }
  squares = sum_of_warp(squares);
  if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) squares += shared.squares[w];
  const float scale = rsqrtf(squares / a.K + a.eps);
#pragma unroll
  for (int j = 0; j < kMostOfThread; ++j) {
    const int i = threadIdx.x + j * kThreads;
    if (i >= a.K / 8) break;
    shared.x[i] = scaled<T>(sums[j], scale, shared.x[i]);
  }
}

// Five blocks a multiprocessor is what the registers are for: the blocks of the kernel behind have theirs beside them.
template <class T>
__global__ void __launch_bounds__(kThreads, 5) gemv_kernel(const __grid_constant__ GemvArguments a) {
  extern __shared__ __align__(128) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t ring = shared_address(shared.ring[warp]), full = shared_address(shared.full[warp]);
  if (lane < kStages) Barrier{full + 8 * lane}.init(1);
  fence_barriers();
  __syncwarp();

  const int step = 2 * kWarps * gridDim.x, first = 2 * (blockIdx.x * kWarps + warp);
  int next_row = first, next_part = 0;  // what is asked for next
  const auto ask = [&](int stage) {
    if (next_row >= a.N) return;
    if (elect()) {
      const int bytes = 2 * min(kPart, a.K - next_part);
      const bool has_two = next_row + 1 < a.N;
      const T* const from = static_cast<const T*>(a.weight) + static_cast<int64_t>(next_row) * a.K + next_part;
      const Barrier barrier{full + 8 * stage};
      barrier.arrive_and_expect(bytes * (1 + has_two));
      load_bytes(ring + stage * 2 * kRow, from, bytes, barrier, kGoFirst);
      if (has_two) load_bytes(ring + stage * 2 * kRow + kRow, from + a.K, bytes, barrier, kGoFirst);
    }
    if ((next_part += kPart) >= a.K) next_part = 0, next_row += step;
  };
  // The first blocks begin beside the kernel before, the others when it ends: what they ask for delays the row.
  const int ahead = kBlocks * blockIdx.x < gridDim.x ? kStages : 1;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (stage < ahead) ask(stage);
  }
  if (a.norm != nullptr) {
    for (int i = threadIdx.x; i < a.K / 8; i += kThreads) shared.x[i] = __ldg(static_cast<const uint4*>(a.norm) + i);
  }
  let_next_begin();
  wait_for_results_before();
  if (a.norm != nullptr) {
    norm_row<T>(a, shared);
  } else {
    for (int i = threadIdx.x; i < a.K / 8; i += kThreads) shared.x[i] = __ldcg(static_cast<const uint4*>(a.x) + i);
  }
  __syncthreads();
#pragma unroll
  for (int stage = 1; stage < kStages; ++stage) {
    if (stage >= ahead) ask(stage);
  }

  const uint32_t x = shared_address(shared.x) + 16 * lane;
  int stage = 0;
  uint32_t parity = 0;
  for (int row = first; row < a.N; row += step) {
    float2 sums[2] = {};
    for (int part = 0; part < a.K; part += kPart) {
      Barrier{full + 8 * stage}.wait(parity);
      const uint32_t from = ring + stage * 2 * kRow + 16 * lane;
      const int left = a.K - part - 8 * lane;
#pragma unroll
      for (int k = 0; k < kPart / kAtOnce; ++k) {
        if (kAtOnce * k < left) {
          const uint4 columns = load_shared(x + 2 * (part + kAtOnce * k));
          multiply<T>(sums[0], load_shared(from + 2 * kAtOnce * k), columns);
          multiply<T>(sums[1], load_shared(from + kRow + 2 * kAtOnce * k), columns);  // unused where there is no row
        }
      }
      __syncwarp();  // the stage is read
      ask(stage);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    const float y[2] = {sum_of_warp(sums[0].x + sums[0].y), sum_of_warp(sums[1].x + sums[1].y)};
    if (lane < 2 && row + lane < a.N) {
      const int n = row + lane;
      const float bias = a.bias == nullptr ? 0.0f : static_cast<float>(static_cast<const T*>(a.bias)[n]);
      static_cast<T*>(a.y)[n] = static_cast<T>((lane == 0 ? y[0] : y[1]) + bias);
    }
  }
}

}  // namespace

cudaError_t gemv(const GemvArguments& a, const Device& device) {
  const size_t shared_bytes = sizeof(Shared) + 2 * static_cast<size_t>(a.K);
  const int64_t blocks = std::min<int64_t>(kBlocks, (device.shared_bytes + 1024) / (shared_bytes + 1024));
  const Launch how{std::min(blocks * device.multiprocessors, ceil_div(a.N, 2 * kWarps)), kThreads, shared_bytes};
  return launch(a.dtype == Dtype::kBFloat16 ? gemv_kernel<__nv_bfloat16> : gemv_kernel<__half>, how, device, a);
}

}  // namespace moe_lab
