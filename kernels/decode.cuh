// What the kernels of a decoding step share: eight neighbouring elements of 16 bits at a time.
#pragma once

#include "hopper.cuh"
#include "products.cuh"

namespace moe_lab {

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

// Zeros where not `in`.
__device__ __forceinline__ uint4 load_shared(uint32_t from, bool in) {
  uint4 v;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
               "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
               "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
               : "r"(from), "r"(static_cast<int>(in)));
  return v;
}

// The address. ptxas would compute it again at each use, from a special register that is slow to read.
__device__ __forceinline__ uint32_t kept(uint32_t at) {
  asm volatile("mov.u32 %0, %0;" : "+r"(at));
  return at;
}

// Adds to an integer in shared memory, once for a warp. All lanes get what it was.
__device__ __forceinline__ int add_shared(uint32_t at, int number) {
  int before = 0;
  if (threadIdx.x % 32 == 0)
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(at), "r"(number) : "memory");
  return __shfl_sync(0xFFFFFFFFu, before, 0);
}

__device__ __forceinline__ void store_shared(uint32_t to, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

template <class T>
__device__ __forceinline__ void unpack(float* y, const uint4& a) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = two(as[i], T());
    y[2 * i] = p.x, y[2 * i + 1] = p.y;
  }
}

// f(a, b) of each of eight pairs, rounded.
template <class T, class F>
__device__ __forceinline__ uint4 each(const uint4& a, const uint4& b, F f) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
  uint32_t y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = two(as[i], T()), q = two(bs[i], T());
    y[i] = pack(f(p.x, q.x), f(p.y, q.y), T());
  }
  return {y[0], y[1], y[2], y[3]};
}

template <class T>
__device__ __forceinline__ uint4 add(const uint4& a, const uint4& b) {
  return each<T>(a, b, [](float p, float q) { return p + q; });
}

template <class T>
__device__ __forceinline__ uint4 scaled(const uint4& a, float scale, const uint4& weight) {
  return each<T>(a, weight, [scale](float p, float w) { return p * scale * w; });
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const uint4& a) {
  float2 sum = {};
  multiply<T>(sum, a, a);
  return sum.x + sum.y;
}

// Of all lanes, in the same order in each.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int s = 16; s > 0; s /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, s);
  return x;
}

// A vector's eight elements for `Sum`: words 0 and 2 side by side, then 1 and 3, as each product takes two neighbouring
// registers.
__device__ __forceinline__ uint4 for_sum(const uint4& v) { return {v.x, v.z, v.y, v.w}; }

// The sum of products of a row of weights with a vector, 256 elements at once, of which a lane has eight neighbours.
// Two instructions do it for 24 that unpack and multiply. The weights of lane 4 g + m are words of rows g and g + 8 of
// the first factor. As column g of the other, `low` gets the words of the vector that go with row g, and `high` those
// that go with row g + 8. So the sums stand at (g, g) of `low` and (g + 8, g) of `high`; the rest is dropped.
struct Sum {
  float low[4] = {}, high[4] = {};

  template <class T>
  __device__ __forceinline__ void add(const uint4& weights, const uint4& vector) {
    multiply_16x8(low, weights, vector.x, vector.y, T());
    multiply_16x8(high, weights, vector.z, vector.w, T());
  }

  // What the lane has of it.
  __device__ __forceinline__ float part() const {
    const int lane = threadIdx.x % 32;
    return lane % 4 != lane / 8 ? 0.0f : lane / 4 % 2 == 0 ? low[0] + high[2] : low[1] + high[3];
  }
};

// d (8 x 8) += x (8 x 16) w (8 x 16)^T. The instruction has room for 16 rows of x. Lane 4 g + m has of d the columns 2
// m and 2 m + 1 of row g, and of both factors of row g four elements, the same ones.
#define MOE_LAB_MULTIPLY(T, NAME)                                                                                 \
  __device__ __forceinline__ void multiply_16(float2& d, uint32_t x0, uint32_t x1, uint32_t w0, uint32_t w1, T) { \
    asm("{\n.reg .f32 none0, none1;\n"                                                                            \
        "mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, none0, none1}, {%2, %6, %3, %6}, "  \
        "{%4, %5}, {%0, %1, %7, %7};\n}"                                                                          \
        : "+f"(d.x), "+f"(d.y)                                                                                    \
        : "r"(x0), "r"(x1), "r"(w0), "r"(w1), "r"(0), "f"(0.0f));                                                 \
  }
MOE_LAB_MULTIPLY(__nv_bfloat16, "bf16")
MOE_LAB_MULTIPLY(__half, "f16")
#undef MOE_LAB_MULTIPLY

}  // namespace moe_lab
