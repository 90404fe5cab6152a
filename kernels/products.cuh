// The product that a warp's tensor cores compute at once, of two factors with 16 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moe_lab {

// d (16 x 8) += a (16 x 16) b (8 x 16)^T. Lane 4 g + m has of d the columns 2 m and 2 m + 1 of rows g and g + 8, of a
// four elements of row g (x and z) and of row g + 8 (y and w), and of b the same four of row g.
#define MOE_LAB_MULTIPLY(T, NAME)                                                                             \
  __device__ __forceinline__ void multiply_16x8(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1, T) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                        \
                 "{%0, %1, %2, %3};"                                                                          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));                                 \
  }
MOE_LAB_MULTIPLY(__nv_bfloat16, "bf16")
MOE_LAB_MULTIPLY(__half, "f16")
#undef MOE_LAB_MULTIPLY

}  // namespace moe_lab
