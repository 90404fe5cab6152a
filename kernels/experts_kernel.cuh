// The products of the expert MLPs on Hopper: weights are the rows of a tile, tokens its columns.
//
//   up:   h[n, f] = act(x[row(n)] . W_gate[e, f], x[row(n)] . W_up[e, f])     n: sorted slots, e: the expert of n
//   down: o[n, d] = h[n] . W_down[e, d]                                       or o[slot(n), d]
//
// Columns go in steps of 16 and their number is chosen for each tile, rows in steps of 64. So every byte of the weights
// is read once where an expert has few tokens, and few columns are wasted where it has many. A block stays and takes
// tile after tile: one warpgroup fills a ring of stages, the others multiply. The rows of an `up` tile are the gate and
// the up rows of the same features, so these meet in the registers of a thread.
#pragma once

#include "cuda.h"
#include "experts_activation.cuh"
#include "experts_rows.cuh"
#include "experts_schedule.cuh"
#include "experts_store.cuh"
#include "hopper.cuh"

namespace moe_lab {

constexpr int kDepth = 64;  // elements of a row in a stage: the 128 bytes of `kRowBytes`
constexpr int kMostStages = 12;

// GROUPS warpgroups multiply twice 64 rows each, by TOKENS columns at most.
template <int GROUPS, int TOKENS>
struct TileShape {
  static constexpr int kGroups = GROUPS, kTokens = TOKENS;
  static constexpr int kRows = 128 * GROUPS;
  static constexpr int kThreads = 128 * (GROUPS + 1);
  static constexpr int kBlocksPerSm = GROUPS == 1 ? 2 : 1;
  static constexpr int kRegisters = GROUPS == 1 ? 200 : 224;  // of a thread that multiplies; the others have 56
  static constexpr int kWeightBytes = kRows * kRowBytes;
  static constexpr int kHalf = TOKENS / 32;  // of a tile's sixteens

  static __host__ __device__ constexpr int stage_bytes(int tokens) { return kWeightBytes + tokens * kRowBytes; }
  static __host__ __device__ constexpr int store_bytes(int tokens) {
    return GROUPS == 1 ? 4 * WarpStore::kBytes : GROUPS * tokens * kRowBytes;
  }
  static constexpr int bytes_beside_stages(int tokens, int E, int64_t few_slots) {
    return store_bytes(tokens) + kMostStages * static_cast<int>(2 * 8 + sizeof(Tile)) + Tables::bytes(E, few_slots);
  }
};
using FewTile = TileShape<1, 16>;     // less code to fetch, which a kernel of few microseconds waits for
using NarrowTile = TileShape<1, 64>;  // few tokens: bound by the bytes of the weights
using WideTile = TileShape<2, 192>;

// The stages of a block, and whose turn it is.
struct Ring {
  uint32_t stages, barriers;
  Tile* tiles;  // [kMostStages], of the stages that begin one
  int stage_bytes, count, stage = 0;
  uint32_t parity;

  __device__ __forceinline__ uint32_t at() const { return stages + stage * stage_bytes; }
  __device__ __forceinline__ Barrier full(int which) const { return Barrier{barriers + which * 8}; }
  __device__ __forceinline__ Barrier empty(int which) const { return Barrier{barriers + (kMostStages + which) * 8}; }
  __device__ __forceinline__ void advance() {
    if (++stage == count) stage = 0, parity ^= 1;
  }
};

// The products of a stage: two blocks of 64 rows by N tokens by 64 elements.
template <class T, int N, int BLOCK_BYTES, int SUMS>
__device__ __forceinline__ void multiply(float (&sums)[2][SUMS], uint64_t a, uint64_t b, int adds) {
  begin_products();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    Product<T, N>::run(sums[0], a + k * kStep, b + k * kStep, k == 0 ? adds : 1);
    Product<T, N>::run(sums[1], a + (BLOCK_BYTES >> 4) + k * kStep, b + k * kStep, k == 0 ? adds : 1);
  }
  commit_products();
}

// One branch around all of them: with branches or functions between products, ptxas waits for each of them.
template <class T, class Shape>
__device__ __forceinline__ void multiply_any(float (&sums)[2][Shape::kTokens / 2], uint64_t a, uint64_t b, int adds,
                                             int sixteens) {
  constexpr int kBlockBytes = 64 * Shape::kGroups * kRowBytes;
#define MOE_LAB_CASE(I)                                                                         \
  case I:                                                                                       \
    if constexpr (16 * I <= Shape::kTokens) multiply<T, 16 * I, kBlockBytes>(sums, a, b, adds); \
    break;
  switch (sixteens) {
    MOE_LAB_CASE(1)
    MOE_LAB_CASE(2)
    MOE_LAB_CASE(3)
    MOE_LAB_CASE(4)
    MOE_LAB_CASE(5)
    MOE_LAB_CASE(6)
    MOE_LAB_CASE(7)
    MOE_LAB_CASE(8)
    MOE_LAB_CASE(9)
    MOE_LAB_CASE(10)
    MOE_LAB_CASE(11)
    MOE_LAB_CASE(12)
  }
#undef MOE_LAB_CASE
}

// The steps of a tile's sum.
struct Depth {
  int begin, end;
  __device__ __forceinline__ Depth(const Tile& tile, const MatmulArguments& a)
      : begin(tile.piece * a.piece_depth), end(min(begin + a.piece_depth, a.depth)) {}
};

// Waits for the stages of the next `together` steps, as far as the tile has them, and asks for their weights at once:
// memory is quicker with so many neighbouring bytes of a row than with 128 at a time.
template <class Shape, bool UP>
__device__ __forceinline__ void load_weights(Ring ring, const CUtensorMap* weights, const Tile& tile, int k,
                                             const Depth& depth, int bytes_of_stage, const MatmulArguments& a) {
  const Ring first = ring;
  for (int i = 0, at = k; i < a.together && at < depth.end; ++i, at += kDepth, ring.advance()) {
    ring.empty(ring.stage).wait(ring.parity);
  }
  ring = first;
  for (int i = 0, at = k; i < a.together && at < depth.end; ++i, at += kDepth, ring.advance()) {
    const Barrier full = ring.full(ring.stage);
    if (at == depth.begin) ring.tiles[ring.stage] = tile;
    full.arrive_and_expect(bytes_of_stage);
    if constexpr (UP) {  // the gate rows, and the up rows of the same features
      load_tile(ring.at(), weights, full, a.policy, at, tile.row_tile * (Shape::kRows / 2), 0, tile.expert);
    } else {
      load_tile(ring.at(), weights, full, a.policy, at, tile.row_tile * Shape::kRows, tile.expert);
    }
  }
}

// Fills the ring: weights come by tiles, rows of x by copies of all 128 threads, 16 bytes each.
template <class Shape>
__device__ __forceinline__ void fill_by_gathering(Ring ring, Schedule schedule, int tiles, const CUtensorMap* weights,
                                                  const int* perm, const MatmulArguments& a) {
  const int thread = threadIdx.x, chunk = thread % 8, row = thread / 8;
  int last = -1;  // the stage whose rows are not announced yet
  const auto announce = [&] {
    fence_for_async();
    __syncwarp();
    if (thread % 32 == 0) ring.full(last).arrive();
  };
  for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
    const Tile tile = schedule.at(number, a);
    uint32_t rows[Shape::kTokens / 16];  // in 16 bytes
#pragma unroll
    for (int i = 0; i < Shape::kTokens / 16; ++i) {
      const int source = row + 16 * i < tile.tokens ? perm[tile.first + row + 16 * i] / a.slots_per_row : 0;
      rows[i] = static_cast<uint32_t>(source) * static_cast<uint32_t>(a.depth / 8) + chunk;
    }
    for (int k = 0, step = 0; k < a.depth; k += kDepth, ++step) {
      const uint32_t tokens_at = ring.at() + Shape::kWeightBytes;
      if (thread == 0 && step % a.together == 0) {
        load_weights<Shape, true>(ring, weights, tile, k, Depth(tile, a), Shape::kWeightBytes, a);
      }
      ring.empty(ring.stage).wait(ring.parity);
      const int bytes = k + chunk * 8 < a.depth ? 16 : 0;  // elements past the end are zeros: 0 * NaN is NaN
#pragma unroll
      for (int i = 0; i < Shape::kTokens / 16; ++i) {
        const int r = row + 16 * i;
        if (r < tile.tokens) {
          copy_16(tokens_at + r * kRowBytes + ((chunk ^ (r & 7)) << 4),
                  static_cast<const uint4*>(a.x) + (rows[i] + (bytes ? k / 8 : 0)), bytes);
        }
      }
      commit_copies();
      if (last >= 0) wait_copies<1>(), announce();  // the stage before is there; this one is announced with the next
      last = ring.stage;
      ring.advance();
    }
  }
  if (last >= 0) wait_copies<0>(), announce();
}

// The same by one thread, where the rows of tokens are in sorted order and come by tiles too.
template <class Shape, bool UP>
__device__ __forceinline__ void fill_by_tiles(Ring ring, Schedule schedule, int tiles, const CUtensorMap* weights,
                                              const CUtensorMap* tokens, const MatmulArguments& a) {
  const auto load_tokens = [&](const Tile& tile, int k, int stage) {
    const uint32_t at = ring.stages + stage * ring.stage_bytes + Shape::kWeightBytes;
    for (int i = 0; i < tile.tokens; i += a.box) {
      load_tile(at + i * kRowBytes, tokens, ring.full(stage), k, tile.first + i);
    }
  };
  // `down`: the weights of the first stages do not wait for the kernel before, which writes the tokens.
  bool waits = !UP;
  Schedule behind = schedule;
  const auto begin_tokens = [&](int steps) {
    wait_for_results_before();
    waits = false;
    int step = 0;
    for (int number = blockIdx.x; step < steps; number += gridDim.x) {
      const Tile tile = behind.at(number, a);
      const Depth depth(tile, a);
      for (int k = depth.begin; k < depth.end && step < steps; k += kDepth) load_tokens(tile, k, step++);
    }
  };
  int steps = 0;
  for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
    const Tile tile = schedule.at(number, a);
    const Depth depth(tile, a);
    const int boxes = (tile.tokens + a.box - 1) / a.box;
    const int bytes = Shape::kWeightBytes + boxes * a.box * kRowBytes;
    for (int k = depth.begin, step = 0; k < depth.end; k += kDepth, ++step) {
      if (step % a.together == 0) {
        if (waits && steps + a.together > ring.count) begin_tokens(steps);
        load_weights<Shape, UP>(ring, weights, tile, k, depth, bytes, a);
      }
      if constexpr (UP) {
        if (step == 0) wait_for_rows(a, tile, schedule.offsets[a.E]);
      }
      if (!waits) load_tokens(tile, k, ring.stage);
      ++steps;
      ring.advance();
    }
  }
  if (waits) begin_tokens(steps);
}

// The biases of this lane's two rows, which are eight apart.
struct Biases {
  float of[2] = {};
  __device__ __forceinline__ Biases(const float* bias, int64_t row, bool inside) {
    if (bias != nullptr && inside) of[0] = bias[row], of[1] = bias[row + 8];
  }
};

// Four pairs of 16 tokens, of the gate and of up.
template <class T, Activation ACTIVATION>
__device__ __forceinline__ void activate(uint32_t (&four)[4], const float* gate, const float* up,
                                         const Biases& gate_bias, const Biases& up_bias) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float g = gate_bias.of[i % 2], u = up_bias.of[i % 2];
    four[i] = pack(activate<ACTIVATION>(gate[2 * i] + g, up[2 * i] + u),
                   activate<ACTIVATION>(gate[2 * i + 1] + g, up[2 * i + 1] + u), T());
  }
}

// The tile's h. A warp's features are 16 rows of the gate and the same of up.
template <class T, class Shape, Activation ACTIVATION, class Store>
__device__ __forceinline__ void store_up(const float (&sums)[2][Shape::kTokens / 2], const Tile& tile, int sixteens,
                                         Store& store, const CUtensorMap* results, const MatmulArguments& a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, group = threadIdx.x / 128 - 1;
  const int column = tile.row_tile * (Shape::kRows / 2) + group * 64, feature = column + warp * 16;
  const bool inside = feature < a.rows;
  const int64_t row = static_cast<int64_t>(tile.expert) * 2 * a.rows + feature + lane / 4;
  const Biases gate_bias(a.bias, row, inside), up_bias(a.bias, row + a.rows, inside);
  T* const out = static_cast<T*>(a.out);
  uint32_t four[4];
  if constexpr (Shape::kGroups == 1) {
    T* const to = out + static_cast<int64_t>(tile.first + lane / 2) * a.rows + feature + lane % 2 * 8;
#pragma unroll
    for (int j = 0; j < Shape::kTokens / 16; ++j) {
      if (j >= sixteens || !inside) break;
      activate<T, ACTIVATION>(four, &sums[0][8 * j], &sums[1][8 * j], gate_bias, up_bias);
      const uint4 eight = store.transpose(j % 2, four);
      if (16 * j + lane / 2 < tile.tokens) {
        *reinterpret_cast<uint4*>(to + static_cast<int64_t>(16 * j) * a.rows) = eight;
      }
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * Shape::kHalf >= sixteens) break;
      store.begin(half);
#pragma unroll
      for (int j = half * Shape::kHalf; j < (half + 1) * Shape::kHalf; ++j) {
        if (j % 2 == 0 && j >= sixteens) break;  // rarely: branches hold up what is around them
        activate<T, ACTIVATION>(four, &sums[0][8 * j], &sums[1][8 * j], gate_bias, up_bias);
        store.put(j, four);
      }
      store.leave(half, results, out, a.rows, column, tile.first, tile.tokens);
    }
  }
}

// A part of the sum for 16 tokens, in float32.
__device__ __forceinline__ void store_partial(const float* sums, int token, int tokens, int slots_of_32,
                                              const Biases& bias, float* partial, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int its = token + i / 2 * 8 + 2 * (lane % 4) + i % 2, at = i / 2 * 4 + i % 2;
    const int slot = __shfl_sync(kAll, slots_of_32, its % 32);
    if (its < tokens) {
      float* const to = partial + static_cast<int64_t>(slot) * rows;
      to[0] = sums[at] + bias.of[0], to[8] = sums[at + 2] + bias.of[1];
    }
  }
}

template <class T>
__device__ __forceinline__ void add_bias(uint32_t (&four)[4], const float* sums, const Biases& bias) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four[i] = pack(sums[2 * i] + bias.of[i % 2], sums[2 * i + 1] + bias.of[i % 2], T());
  }
}

// The tile's part of o: sorted rows by tiles, or the rows of the slots, which lane % 32 of `slots` has for 32 tokens
// each.
template <class T, class Shape, bool PARTIAL, class Store, int SLOTS>
__device__ __forceinline__ void store_down(const float (&sums)[2][Shape::kTokens / 2], const Tile& tile, int sixteens,
                                           const int (&slots)[SLOTS], Store& store, const CUtensorMap* results,
                                           const MatmulArguments& a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, group = threadIdx.x / 128 - 1;
  T* const out = static_cast<T*>(a.out);
  uint32_t four[4];
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const int column = tile.row_tile * Shape::kRows + b * 64 * Shape::kGroups + group * 64, row = column + warp * 16;
    const bool inside = row < a.rows;
    const Biases bias(a.bias, static_cast<int64_t>(tile.expert) * a.rows + row + lane / 4, inside && tile.piece == 0);
    if constexpr (Shape::kGroups == 1) {
#pragma unroll
      for (int j = 0; j < Shape::kTokens / 16; ++j) {
        if (j >= sixteens || !inside) break;
        if constexpr (PARTIAL) {
          float* const partial = static_cast<float*>(a.out) + tile.piece * a.slots * a.rows + row + lane / 4;
          store_partial(&sums[b][8 * j], 16 * j, tile.tokens, slots[j / 2], bias, partial, a.rows);
        } else {
          add_bias<T>(four, &sums[b][8 * j], bias);
          const uint4 eight = store.transpose(j % 2, four);
          const int slot = __shfl_sync(kAll, slots[j / 2], j % 2 * 16 + lane / 2);
          if (16 * j + lane / 2 < tile.tokens) {
            *reinterpret_cast<uint4*>(out + static_cast<int64_t>(slot) * a.rows + row + lane % 2 * 8) = eight;
          }
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half * Shape::kHalf >= sixteens) break;
        store.begin(half);
#pragma unroll
        for (int j = half * Shape::kHalf; j < (half + 1) * Shape::kHalf; ++j) {
          if (j % 2 == 0 && j >= sixteens) break;
          add_bias<T>(four, &sums[b][8 * j], bias);
          store.put(j, four);
        }
        store.leave(half, results, out, a.rows, column, tile.first, tile.tokens);
      }
    }
  }
}

template <class T, class Shape, bool UP, bool GATHERS, bool PARTIAL, Activation ACTIVATION>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    experts_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap tokens,
                   const __grid_constant__ CUtensorMap results, const __grid_constant__ MatmulArguments a) {
  static_assert((UP || !GATHERS) && (Shape::kGroups == 1 || !PARTIAL));
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle needs that boundary; nothing stands before
  const int stage_bytes = Shape::stage_bytes(a.tokens);
  uint8_t* const staging = shared + a.stages * stage_bytes;
  uint8_t* const barriers = staging + Shape::store_bytes(a.tokens);
  Tile* const ring_tiles = reinterpret_cast<Tile*>(barriers + 2 * kMostStages * 8);
  Tables tables(reinterpret_cast<int*>(ring_tiles + kMostStages), a);
  Ring ring{shared_address(shared), shared_address(barriers), ring_tiles, stage_bytes, a.stages};

  if (threadIdx.x == 0) {
    prefetch_map(&weights);
    if constexpr (!GATHERS) prefetch_map(&tokens);
    if constexpr (Shape::kGroups == 2) prefetch_map(&results);
    for (int s = 0; s < a.stages; ++s) {
      ring.full(s).init(GATHERS ? 5 : 1);  // the tile of weights, and each warp's rows of tokens
      ring.empty(s).init(4 * Shape::kGroups);
    }
    fence_barriers();
  }
  // `up` reads the routing from here on. `down` may begin only then: it reads the routing and does not wait for it, so
  // past the L1 cache, which may hold what stood there before.
  if constexpr (UP) wait_for_results_before();
  let_next_begin();
  constexpr bool kSorts = GATHERS || Shape::kGroups == 1;               // else the slots are sorted already
  static_assert(Tables::kBytesOfCounts <= 2 * Shape::stage_bytes(16));  // their least number
  tables.fill<Shape::kThreads, kSorts>(a, shared);
  const bool sorts = kSorts && a.ids != nullptr;
  Schedule schedule{tables.offsets, tables.tiles_before, a.row_tiles * a.pieces};
  const int tiles = tables.tiles_before[a.E] * schedule.per_token_tile;

  const int group = __shfl_sync(kAll, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  if (group == 0) {
    give_registers<56>();
    ring.parity = 1;
    if constexpr (GATHERS) {
      fill_by_gathering<Shape>(ring, schedule, tiles, &weights, sorts ? tables.perm : a.perm, a);
    } else if (threadIdx.x == 0) {
      fill_by_tiles<Shape, UP>(ring, schedule, tiles, &weights, &tokens, a);
    } else if (UP && threadIdx.x >= 32) {
      copy_rows<T>(a, tables.offsets[a.E]);
    }
  } else {
    take_registers<Shape::kRegisters>();
    ring.parity = 0;
    float sums[2][Shape::kTokens / 2];
    using Store = std::conditional_t<Shape::kGroups == 1, WarpStore, TileStore<Shape::kHalf>>;
    Store store = [&] {
      if constexpr (Shape::kGroups == 1) {
        return WarpStore(staging + threadIdx.x % 128 / 32 * WarpStore::kBytes);
      } else {
        return Store(staging + (group - 1) * a.tokens * kRowBytes, group);
      }
    }();
    for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
      ring.full(ring.stage).wait(ring.parity);
      const Tile tile = ring.tiles[ring.stage];
      const Depth depth(tile, a);
      const int sixteens = __shfl_sync(kAll, (tile.tokens + 15) / 16, 0);
      int slots[Shape::kGroups == 1 ? (Shape::kTokens + 31) / 32 : 1] = {};
      if constexpr (!UP && Shape::kGroups == 1) {  // early, for they come from afar
#pragma unroll
        for (int i = 0; i < (Shape::kTokens + 31) / 32; ++i) {
          const int at = tile.first + lane + 32 * i;
          slots[i] = lane + 32 * i >= tile.tokens ? 0 : sorts ? tables.perm[at] : __ldcg(a.perm + at);
        }
      }
      int adds = 0;
#pragma unroll 1
      for (int k = depth.begin; k < depth.end; k += kDepth) {
        ring.full(ring.stage).wait(ring.parity);
        multiply_any<T, Shape>(sums, matrix_at(ring.at() + (group - 1) * 64 * kRowBytes),
                               matrix_at(ring.at() + Shape::kWeightBytes), adds, sixteens);
        adds = 1;
        // Meanwhile another warpgroup multiplies. A stage that goes back a step earlier is worth more than a second
        // group of products under way (mixtral's shape, T = 512: 477 us against 520; 16384: 3 % on an H200).
        wait_products<0>();
        if (lane == 0) ring.empty(ring.stage).arrive();
        ring.advance();
      }
      if constexpr (UP) {
        store_up<T, Shape, ACTIVATION>(sums, tile, sixteens, store, &results, a);
      } else {
        store_down<T, Shape, PARTIAL>(sums, tile, sixteens, slots, store, &results, a);
      }
    }
    if constexpr (Shape::kGroups == 2) wait_stores();
  }
}

}  // namespace moe_lab
