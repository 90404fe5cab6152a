// The expert MLPs of one token, in one launch: each weight of its experts is read once, and that is what takes time.
//
// A warp multiplies two rows of the weights at a time: of `up` the gate row and the up row of a feature, of `down` the
// rows of two experts for one element of y. Features are dealt evenly to the blocks, and each warp takes the block's
// next one when it has asked for all of the one before. Rows of `down` are dealt evenly to the warps. Each warp has a
// ring of stages of its own and asks for the next rows as it empties one. So the first weights of `down` come while the
// blocks wait for each other's h, and the sum over the experts stays within a warp. One loop serves both products: code
// is read from memory too.
//
// What counts is the time from a stage's arrival to the request for the next one. So a warp knows beforehand what it
// will ask for, and puts sums together afterwards.
#include <cooperative_groups.h>

#include <cstddef>
#include <cstring>

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

// Of `up`: the gate row and the up row of feature `row` of an expert. Of `down`: row `row` of an expert and of the next
// one. A stage holds a part of both.
struct alignas(16) Place {
  int row;
  int left;         // elements of a row from the part on
  int vector;       // the byte of x or h where the part begins
  uint16_t expert;  // as `Chosen` counts them
  uint8_t rows;     // in the stage: 2; of `down` 1 where no expert is left for the second, 0 where no row is left
  bool up;
};
static_assert(sizeof(Place) == sizeof(uint4));

struct Shared {
  uint8_t ring[kWarps][kStages][2 * kRow];
  Place places[kWarps][kStages];  // what a stage holds
  uint64_t full[kWarps][kStages];
  Chosen chosen;
  int next_feature;               // of the block's features, from 0
  alignas(16) uint8_t vectors[];  // x [D], later h [n, F], `for_sum`
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
    reinterpret_cast<uint4*>(shared.vectors)[i] = for_sum(__ldcg(static_cast<const uint4*>(from) + i));
  }
  __syncthreads();
}

// What a warp asks for next; all lanes know it.
template <class T>
struct Asks {
  const ExpertsArguments& a;
  const Chosen& chosen;
  uint32_t next_feature;  // the address of the one in `Shared`
  uint64_t policy;
  uint32_t per_feature;  // 2^32 / F, rounded up: a feature's number times this has its expert in the upper half
  Place next;
  const T *one, *two;  // the rows at `next`

  __device__ __forceinline__ Asks(const ExpertsArguments& a, const Chosen& chosen, uint32_t next_feature,
                                  uint64_t policy)
      : a(a), chosen(chosen), next_feature(next_feature), policy(policy), per_feature(0xFFFFFFFFu / a.F + 1),
        next{0, 0, 0, 0, 0, true} {}

  __device__ __forceinline__ const T* row(const void* weights, int expert, int rows, int columns) const {
    const uint32_t before = chosen.experts[expert] * rows + next.row;
    return static_cast<const T*>(weights) + static_cast<uint64_t>(before) * static_cast<uint32_t>(columns);
  }

  // By one lane. Where no rows are left the stage is full at once.
  __device__ __forceinline__ void load(uint32_t stage, Barrier full) const {
    const int bytes = 2 * min(kPart, next.left);
    full.arrive_and_expect(bytes * next.rows);
    if (next.rows > 0) load_bytes(stage, one, bytes, full, policy);
    if (next.rows > 1) load_bytes(stage + kRow, two, bytes, full, policy);
  }

  // To the next part of the rows, else to the block's next feature, or else to the next experts or rows of `down`.
  __device__ __forceinline__ void advance() {
    if (next.left > kPart) {
      next.left -= kPart, next.vector += kRow, one += kPart, two += kPart;
      return;
    }
    int number = next.row, expert = next.expert + 2;
    bool up = next.up;
    if (up) {
      number = add_shared(next_feature, 1) * gridDim.x + blockIdx.x;
      expert = __umulhi(number, per_feature);
      number -= expert * a.F;
      up = expert < chosen.n;
      if (!up) number = threadIdx.x / 32 * gridDim.x + blockIdx.x, expert = 0;
    } else if (expert >= chosen.n) {
      number += kWarps * gridDim.x, expert = 0;
    }
    const int rows = up ? 2 : number < a.D ? min(2, chosen.n - expert) : 0;
    next = {
        number, up ? a.D : a.F, up ? 0 : 2 * expert * a.F, static_cast<uint16_t>(expert), static_cast<uint8_t>(rows),
        up};
    if (up) {
      one = row(a.w_gate_up, expert, 2 * a.F, a.D);
      two = one + static_cast<uint64_t>(static_cast<uint32_t>(a.F)) * static_cast<uint32_t>(a.D);
    } else {
      one = row(a.w_down, expert, a.D, a.F);
      two = row(a.w_down, rows > 1 ? expert + 1 : expert, a.D, a.F);
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
  if (threadIdx.x == 0) shared.next_feature = 0;
  fence_barriers();
  // It takes effect when all blocks are running, so the next kernel cannot displace one. What that one asks for comes
  // while the gate is computed, which leaves the memory idle.
  let_next_begin();
  wait_for_results_before();
  if (warp == 0) choose(shared.chosen, a);
  load_vectors(shared, a.x, a.D, 32);  // before the weights, behind which it would wait
  const uint32_t base = kept(shared_address(memory));
  const uint32_t ring = base + offsetof(Shared, ring) + sizeof(shared.ring[0]) * warp;
  const uint32_t places = base + offsetof(Shared, places) + sizeof(shared.places[0]) * warp;
  const uint32_t full = base + offsetof(Shared, full) + sizeof(shared.full[0]) * warp;
  const uint32_t vectors = base + offsetof(Shared, vectors) + 16 * lane;
  Asks<T> asks(a, chosen, base + offsetof(Shared, next_feature), policy);

  bool has_h = false;
  uint32_t parity = 0;
  Sum sums[2];
  float y = 0.0f;  // of a lane
#pragma unroll 1
  for (int i = -kStages - 1, stage = 0;; ++i) {  // first the place is found, then the stages are asked for
    Place now;
    if (i >= 0) {
      const uint4 words = load_shared(places + sizeof(Place) * stage);
      memcpy(&now, &words, sizeof(now));
      Barrier{full + 8 * stage}.wait(parity);
      if (!now.up && !has_h) {
        cooperative_groups::this_grid().sync();
        load_vectors(shared, a.h, chosen.n * a.F);
        has_h = true;
      }
      if (!now.up && now.row >= a.D) break;
      const uint32_t rows = ring + stage * 2 * kRow + 16 * lane;
      const uint32_t one = vectors + now.vector, two = one + (now.up || now.rows < 2 ? 0 : 2 * a.F);
      const int left = now.rows > 0 ? min(now.left, kPart) : 0;
      const auto multiply = [&](int at, bool in) {  // the second row is unused where there is none
        sums[0].add<T>(load_shared(rows + at, in), load_shared(one + at, in));
        sums[1].add<T>(load_shared(rows + kRow + at, in), load_shared(two + at, in));
      };
      if (left == kPart) {  // no branch between the loads
#pragma unroll
        for (int k = 0; k < kPart; k += kAtOnce) multiply(2 * k, true);
      } else {
        const int whole = left / kAtOnce * kAtOnce;
#pragma unroll 1
        for (int k = 0; k < whole; k += kAtOnce) multiply(2 * k, true);
        if (whole < left) multiply(2 * whole, whole + 8 * lane < left);
      }
      __syncwarp();  // the stage is read
    }
    if (i >= -kStages && elect()) {
      uint4 words;
      memcpy(&words, &asks.next, sizeof(words));
      store_shared(places + sizeof(Place) * stage, words);
      asks.load(ring + stage * 2 * kRow, Barrier{full + 8 * stage});
    }
    __syncwarp();  // the place is seen
    asks.advance();
    if (i >= -kStages && ++stage == kStages) stage = 0, parity ^= i >= 0;
    if (i < 0 || now.left > kPart) continue;
    float first = sums[0].part(), second = sums[1].part();
    sums[0] = sums[1] = {};
    if (!now.up) {
      if (now.rows > 0) y += a.scales_input ? first : first * chosen.weights[now.expert];
      if (now.rows > 1) y += a.scales_input ? second : second * chosen.weights[now.expert + 1];
      if (now.expert + 2 < chosen.n) continue;
      first = y, y = 0.0f;
      if (a.down_bias != nullptr && lane < chosen.n) {
        const float bias = __ldg(a.down_bias + static_cast<int64_t>(chosen.experts[lane]) * a.D + now.row);
        first += a.scales_input ? bias : bias * chosen.weights[lane];
      }
    }
    first = sum_of_warp(first), second = sum_of_warp(second);
    if (lane == 0 && now.up) store_h<T>(a, chosen, now, first, second);
    if (lane == 0 && !now.up) static_cast<T*>(a.y)[now.row] = static_cast<T>(first);
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
