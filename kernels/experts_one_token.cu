// The expert MLPs of one token, in one launch: each weight of its experts is read once, and that is what takes time.
//
// A warp multiplies two rows of the weights at a time: of `up` the gate row and the up row of a feature, of `down` the
// rows of two experts for one element of y. Rows are dealt evenly to all warps. Each has a ring of stages of its own
// and asks for the next rows as it empties one. So the first weights of `down` come while the blocks wait for each
// other's h, and the sum over the experts stays within a warp. One loop serves both products: code is read from memory
// too.
#include <cooperative_groups.h>

#include "cuda.h"
#include "decode.cuh"
#include "experts_activation.cuh"
#include "experts_products.h"
#include "hopper.cuh"
#include "route.cuh"

namespace moe_lab {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kStages = 2;
constexpr int kPart = 1024;      // elements of a row in a stage, which has parts of two rows
constexpr int kRow = 2 * kPart;  // bytes
constexpr int kAtOnce = 256;     // elements that a warp multiplies at once, 16 bytes a lane

// The experts of the token's used slots, in their order.
struct Chosen {
  int n, experts[kMostSlotsOfOne];
  float weights[kMostSlotsOfOne];
};

// Of `up`: the gate row and the up row of feature `row` of an expert. Of `down`: row `row` of an expert and of the
// next. `expert` counts those of `Chosen`; `part` is the first element.
struct Place {
  int row, part, expert;
  bool up;
};

struct Shared {
  uint8_t ring[kWarps][kStages][2 * kRow];
  Place places[kWarps][kStages];  // what a stage holds
  uint64_t full[kWarps][kStages];
  Chosen chosen;
  alignas(16) uint8_t vectors[];  // x [D], then h [n, F]
};
static_assert(sizeof(Shared) + 2 * kMostVectorsOfOne <= 227 * 1024, "what a block may have");

__device__ __forceinline__ void choose(Chosen& chosen, const ExpertsArguments& a) {
  const int lane = threadIdx.x % 32;
  const int id = lane < a.K ? __ldcg(a.ids + lane) : -1;
  const float weight = lane < a.K ? __ldcg(a.weights + lane) : 0.0f;
  const bool used = 0 <= id && id < a.E;
  const uint32_t all = __ballot_sync(kAll, used);
  const int at = __popc(all & ((1u << lane) - 1));
  if (used) chosen.experts[at] = id, chosen.weights[at] = weight;
  if (lane == 0) chosen.n = __popc(all);
}

// By the threads from `first` on; all are in step after it.
__device__ __forceinline__ void load_vectors(Shared& shared, const void* from, int elements, int first = 0) {
  for (int i = static_cast<int>(threadIdx.x) - first; i >= 0 && i < elements / 8; i += kThreads - first) {
    reinterpret_cast<uint4*>(shared.vectors)[i] = __ldcg(static_cast<const uint4*>(from) + i);
  }
  __syncthreads();
}

// What a warp asks for, a place ahead of another.
template <class T>
struct Asks {
  const ExpertsArguments& a;
  const Chosen& chosen;
  uint64_t policy;
  int first, step;  // rows first, first + step, ... are the warp's; those of `up` count through all experts
  Place next;

  __device__ __forceinline__ Asks(const ExpertsArguments& a, const Chosen& chosen, uint64_t policy)
      : a(a), chosen(chosen), policy(policy), first(threadIdx.x / 32 * gridDim.x + blockIdx.x),
        step(kWarps * gridDim.x), next{first, 0, 0, true} {
    find_expert();
  }

  __device__ __forceinline__ void find_expert() {
    while (next.row >= a.F && next.expert < chosen.n) next.row -= a.F, ++next.expert;
    if (next.expert >= chosen.n) next = {first, 0, 0, false};
  }

  __device__ __forceinline__ const T* row(int expert, int number) const {
    const T* const weights = static_cast<const T*>(next.up ? a.w_gate_up : a.w_down);
    const int64_t before = static_cast<int64_t>(chosen.experts[expert]) * (next.up ? 2 * a.F : a.D);
    return weights + (before + number) * (next.up ? a.D : a.F) + next.part;
  }

  // The rows at `next`, by one lane; nothing where they have ended, and the stage is full at once.
  __device__ __forceinline__ void load(uint32_t stage, Barrier full) const {
    const int bytes = 2 * min(kPart, (next.up ? a.D : a.F) - next.part);
    const bool has_one = next.expert < chosen.n && (next.up || next.row < a.D);
    const bool has_two = has_one && (next.up || next.expert + 1 < chosen.n);
    full.arrive_and_expect(bytes * (has_one + has_two));
    if (has_one) load_bytes(stage, row(next.expert, next.row), bytes, full, policy);
    if (has_two) {
      const T* const two = next.up ? row(next.expert, next.row + a.F) : row(next.expert + 1, next.row);
      load_bytes(stage + kRow, two, bytes, full, policy);
    }
  }

  __device__ __forceinline__ void advance() {
    next.part += kPart;
    if (next.part < (next.up ? a.D : a.F)) return;
    next.part = 0;
    if (next.up) {
      next.row += step;
      find_expert();
    } else if ((next.expert += 2) >= chosen.n) {
      next.expert = 0, next.row += step;
    }
  }
};

// By one lane: `gate` and `up` are the sums of the warp.
template <class T>
__device__ __forceinline__ void store_h(const ExpertsArguments& a, const Chosen& chosen, const Place& at, float gate,
                                        float up) {
  if (a.scales_input) gate *= chosen.weights[at.expert], up *= chosen.weights[at.expert];
  if (a.gate_up_bias != nullptr) {
    const float* const bias = a.gate_up_bias + static_cast<int64_t>(chosen.experts[at.expert]) * 2 * a.F + at.row;
    gate += __ldg(bias), up += __ldg(bias + a.F);
  }
  const float h = a.activation == Activation::kClamped ? activate<Activation::kClamped>(gate, up)
                                                       : activate<Activation::kSilu>(gate, up);
  static_cast<T*>(a.h)[static_cast<int64_t>(at.expert) * a.F + at.row] = static_cast<T>(h);
}

// Two blocks a multiprocessor is what the registers are for: the kernels before and after have theirs beside this
// one's.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) one_token_kernel(const ExpertsArguments a, uint64_t policy) {
  extern __shared__ __align__(128) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Chosen& chosen = shared.chosen;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane < kStages) Barrier{shared_address(&shared.full[warp][lane])}.init(1);
  fence_barriers();
  // It takes effect when all blocks are running, so the next kernel cannot displace one. What that one asks for comes
  // while the gate is computed, which leaves the memory idle.
  let_next_begin();
  wait_for_results_before();
  if (warp == 0) choose(shared.chosen, a);
  load_vectors(shared, a.x, a.D, 32);  // before the weights, behind which it would wait
  const uint32_t ring = shared_address(shared.ring[warp]), full = shared_address(shared.full[warp]);
  const uint32_t vectors = shared_address(shared.vectors);
  Asks<T> asks(a, chosen, policy);

  bool has_h = false;
  uint32_t parity = 0;
  float2 sums[2] = {};
  float y = 0.0f;  // of a lane
#pragma unroll 1
  for (int i = -kStages, stage = 0;; ++i) {
    if (i >= 0) {
      Barrier{full + 8 * stage}.wait(parity);
      const Place now = shared.places[warp][stage];
      if (!now.up && !has_h) {
        cooperative_groups::this_grid().sync();
        load_vectors(shared, a.h, chosen.n * a.F);
        has_h = true;
      }
      if (!now.up && now.row >= a.D) break;
      const int depth = now.up ? a.D : a.F, left = depth - now.part - 8 * lane;
      const bool has_one = now.expert < chosen.n, has_two = now.up || now.expert + 1 < chosen.n;
      const uint32_t rows = ring + stage * 2 * kRow + 16 * lane;
      const uint32_t one = vectors + 2 * (now.up ? now.part : now.expert * a.F + now.part) + 16 * lane;
      const uint32_t two = now.up ? one : one + 2 * a.F;
#pragma unroll
      for (int k = 0; k < kPart / kAtOnce; ++k) {
        const int at = 2 * kAtOnce * k;
        if (kAtOnce * k < left && has_one) {
          multiply<T>(sums[0], load_shared(rows + at), load_shared(one + at));
          if (has_two) multiply<T>(sums[1], load_shared(rows + kRow + at), load_shared(two + at));
        }
      }
      __syncwarp();  // the stage is read
      if (now.part + kPart >= depth) {
        float first = sums[0].x + sums[0].y, second = sums[1].x + sums[1].y;
        sums[0] = sums[1] = {};
        if (!now.up) {
          if (has_one) y += a.scales_input ? first : first * chosen.weights[now.expert];
          if (has_two) y += a.scales_input ? second : second * chosen.weights[now.expert + 1];
          first = y;
        }
        if (now.up || now.expert + 2 >= chosen.n) {
          y = 0.0f;
          if (!now.up && a.down_bias != nullptr && lane < chosen.n) {
            const float bias = __ldg(a.down_bias + static_cast<int64_t>(chosen.experts[lane]) * a.D + now.row);
            first += a.scales_input ? bias : bias * chosen.weights[lane];
          }
#pragma unroll
          for (int s = 16; s > 0; s /= 2) {
            first += __shfl_xor_sync(kAll, first, s), second += __shfl_xor_sync(kAll, second, s);
          }
          if (lane == 0 && now.up) store_h<T>(a, chosen, now, first, second);
          if (lane == 0 && !now.up) static_cast<T*>(a.y)[now.row] = static_cast<T>(first);
        }
      }
    }
    if (lane == 0) {
      shared.places[warp][stage] = asks.next;
      asks.load(ring + stage * 2 * kRow, Barrier{full + 8 * stage});
    }
    asks.advance();
    if (++stage == kStages) stage = 0, parity ^= i >= 0;
  }
}

template <class T>
cudaError_t launch_one_token(const ExpertsArguments& a, const Device& device) {
  const size_t vectors = 2 * static_cast<size_t>(std::max(a.D, a.K * a.F));
  Launch how{device.multiprocessors, kThreads, sizeof(Shared) + vectors};
  how.cooperative = true;
  return launch(one_token_kernel<T>, how, device, a, policy_of_weights(a, device));
}

}  // namespace

cudaError_t experts_one_token(const ExpertsArguments& a, const Device& device) {
  return (a.dtype == Dtype::kBFloat16 ? launch_one_token<__nv_bfloat16> : launch_one_token<__half>)(a, device);
}

}  // namespace moe_lab
