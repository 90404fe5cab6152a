// How results leave the registers of the products: 16 tokens at a time, transposed, by way of shared memory.
//
// A thread has the rows lane / 4 and + 8 of its warp's 16, and the columns 2 (lane % 4) and + 1 of every 8. Of 16
// tokens (columns) it makes four pairs: rows 0-7 and 8-15 of the first eight tokens, then of the other eight.
#pragma once

#include "hopper.cuh"

namespace moe_lab {

// A warp's 16 tokens by 16 features; it has room for two of them, so that one is written while the other is read.
struct WarpStore {
  uint32_t write;       // where this lane's row of a matrix goes
  const uint8_t* read;  // what this lane takes: 8 features of token lane / 2

  static constexpr int kBytes = 2 * 512;

  __device__ __forceinline__ explicit WarpStore(uint8_t* staging) {
    const int lane = threadIdx.x % 32, token = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
    write = shared_address(staging) + token * 32 + ((half ^ (token >> 2 & 1)) << 4);
    read = staging + lane / 2 * 32 + ((lane % 2 ^ (lane / 2 >> 2 & 1)) << 4);
  }
  __device__ __forceinline__ uint4 transpose(int which, const uint32_t (&four)[4]) const {
    __syncwarp();
    store_transposed(write + which * 512, four[0], four[1], four[2], four[3]);
    __syncwarp();
    return *reinterpret_cast<const uint4*>(read + which * 512);
  }
};

// A warpgroup's tokens by 64 features, which leave by copies of tiles while the next products begin; in halves of HALF
// sixteens, so that one is written while the other is read.
template <int HALF>
struct TileStore {
  uint8_t* staging;  // rows of 128 bytes, swizzled
  uint32_t write;    // where this lane's row of a matrix goes
  int barrier;       // of the warpgroup
  int last = -1;     // the half that was written last

  __device__ __forceinline__ TileStore(uint8_t* staging, int barrier) : staging(staging), barrier(barrier) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int token = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
    write = shared_address(staging) + token * kRowBytes + ((chunk ^ (token & 7)) << 4);
  }
  // What was in this half has left.
  __device__ __forceinline__ void begin(int half) {
    if (half == last) {
      wait_stores_read<0>();
    } else {
      wait_stores_read<1>();
    }
    last = half;
    sync_threads_of<128>(barrier);
    asm volatile("" : "+r"(write));  // else the address is computed again for each matrix
  }
  __device__ __forceinline__ void put(int j, const uint32_t (&four)[4]) const {
    store_transposed(write + j * 16 * kRowBytes, four[0], four[1], four[2], four[3]);
  }
  // To rows `first` ... of out [., width]. Whole sixteens go by tiles, some from each warp; the rest row by row, for
  // behind it stand the rows of the next expert.
  template <class T>
  __device__ __forceinline__ void leave(int half, const CUtensorMap* map, T* out, int width, int column, int first,
                                        int tokens) const {
    fence_for_async();
    sync_threads_of<128>(barrier);
    const int thread = threadIdx.x % 128, whole = tokens / 16, which = half * HALF + thread / 32 + 4 * (thread % 32);
    if (which < min(whole, (half + 1) * HALF)) {
      store_tile(map, shared_address(staging) + which * 16 * kRowBytes, column, first + 16 * which);
    }
    commit_stores();
    const int row = 16 * whole + thread / 8, chunk = thread % 8;
    if (whole / HALF == half && row < tokens && column + chunk * 8 < width) {
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(first + row) * width + column + chunk * 8) =
          *reinterpret_cast<const uint4*>(staging + row * kRowBytes + ((chunk ^ (row & 7)) << 4));
    }
  }
};

}  // namespace moe_lab
