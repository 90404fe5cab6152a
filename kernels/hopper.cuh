// Hopper's asynchronous instructions: barriers in shared memory, copies of tiles, and the products of a warpgroup.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moe_lab {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier of `count` arrivals; a wait is for the end of the phase of that parity.
struct Barrier {
  uint32_t at;  // in shared memory, 8 bytes

  __device__ __forceinline__ void init(int count) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count));
  }
  __device__ __forceinline__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
  }
  // One arrival, after which the phase also waits for so many bytes of tiles.
  __device__ __forceinline__ void arrive_and_expect(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void wait(uint32_t parity) const {
    asm volatile("{\n.reg .pred p;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, 0x989680;\n"
                 "@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(at),
                 "r"(parity)
                 : "memory");
  }
};

__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// All kernels before have ended, and what they wrote is seen.
__device__ __forceinline__ void wait_for_results_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor to shared memory, at coordinates of which the first counts in elements of a row.
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap* map, Barrier barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier.at), "r"(c0), "r"(c1)
      : "memory");
}
// What the L2 cache does with lines that a copy brings: nothing special, or it gives them up before any other.
constexpr uint64_t kStay = 0x1000000000000000, kGoFirst = 0x12F0000000000000;
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap* map, Barrier barrier, uint64_t policy, int c0,
                                          int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
               "l"(map), "r"(barrier.at), "l"(policy), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap* map, Barrier barrier, uint64_t policy, int c0,
                                          int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
               "l"(map), "r"(barrier.at), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
// Neighbouring bytes, a multiple of 16.
__device__ __forceinline__ void load_bytes(uint32_t to, const void* from, int bytes, Barrier barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
               "%4;" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier.at), "l"(policy)
               : "memory");
}
// The same place in the shared memory of a block of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t at, int block) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
  return there;
}
// A number to a block's shared memory, where a barrier counts its four bytes.
__device__ __forceinline__ void send(uint32_t to, float number, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(number),
               "r"(barrier)
               : "memory");
}
// The other way, in the thread's group of stores.
__device__ __forceinline__ void store_tile(const CUtensorMap* map, uint32_t from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(c0), "r"(c1)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int MOST>  // groups whose source may still be read
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(MOST) : "memory");
}
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// 16 bytes by the thread's own copy, of which `bytes` (0 or 16) are read and the rest are zeros.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int MOST>  // groups that may still be under way
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(MOST) : "memory");
}
// What this thread wrote is seen by the products and the copies of tiles.
__device__ __forceinline__ void fence_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What was written to global memory, by this thread or by one it has synchronised with, is seen by the copies of tiles.
__device__ __forceinline__ void fence_global_for_async() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ __forceinline__ int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(int* to, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// True of one lane of the warp; all lanes call it. ptxas knows so, and makes no loop over lanes around a copy.
__device__ __forceinline__ bool elect() {
  uint32_t is_elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is_elected));
  return is_elected;
}

template <int THREADS>
__device__ __forceinline__ void sync_threads_of(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Four 8 x 8 matrices as the products leave them, rows to columns: lane l gives the address of row l % 8 of matrix l
// / 8.
__device__ __forceinline__ void store_transposed(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// --- products ---
constexpr int kRowBytes = 128;
// Rows of 64 elements of 16 bits, 128 bytes, swizzled in 8 rows as a copy of tiles with 128 bytes leaves them.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
constexpr int kStep = 2;  // what 16 elements along a row add to it

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int MOST>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(MOST) : "memory");
}

#define MOE_LAB_S0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOE_LAB_S1 MOE_LAB_S0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOE_LAB_S2 MOE_LAB_S1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MOE_LAB_S3 MOE_LAB_S2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_LAB_S4 MOE_LAB_S3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MOE_LAB_S5 MOE_LAB_S4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MOE_LAB_S6 MOE_LAB_S5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MOE_LAB_S7 MOE_LAB_S6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MOE_LAB_S8 MOE_LAB_S7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MOE_LAB_S9 MOE_LAB_S8 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MOE_LAB_S10 MOE_LAB_S9 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MOE_LAB_S11 MOE_LAB_S10 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define MOE_LAB_EIGHT(d, i)                                                                                 \
  "+f"(d[8 * (i)]), "+f"(d[8 * (i) + 1]), "+f"(d[8 * (i) + 2]), "+f"(d[8 * (i) + 3]), "+f"(d[8 * (i) + 4]), \
      "+f"(d[8 * (i) + 5]), "+f"(d[8 * (i) + 6]), "+f"(d[8 * (i) + 7])
#define MOE_LAB_D0(d) MOE_LAB_EIGHT(d, 0)
#define MOE_LAB_D1(d) MOE_LAB_D0(d), MOE_LAB_EIGHT(d, 1)
#define MOE_LAB_D2(d) MOE_LAB_D1(d), MOE_LAB_EIGHT(d, 2)
#define MOE_LAB_D3(d) MOE_LAB_D2(d), MOE_LAB_EIGHT(d, 3)
#define MOE_LAB_D4(d) MOE_LAB_D3(d), MOE_LAB_EIGHT(d, 4)
#define MOE_LAB_D5(d) MOE_LAB_D4(d), MOE_LAB_EIGHT(d, 5)
#define MOE_LAB_D6(d) MOE_LAB_D5(d), MOE_LAB_EIGHT(d, 6)
#define MOE_LAB_D7(d) MOE_LAB_D6(d), MOE_LAB_EIGHT(d, 7)
#define MOE_LAB_D8(d) MOE_LAB_D7(d), MOE_LAB_EIGHT(d, 8)
#define MOE_LAB_D9(d) MOE_LAB_D8(d), MOE_LAB_EIGHT(d, 9)
#define MOE_LAB_D10(d) MOE_LAB_D9(d), MOE_LAB_EIGHT(d, 10)
#define MOE_LAB_D11(d) MOE_LAB_D10(d), MOE_LAB_EIGHT(d, 11)

// d (64 x N, fp32) = a (64 x 16) b (N x 16)^T, plus d where `adds`.
template <class T, int N>
struct Product;

#define MOE_LAB_PRODUCT(T, NAME, N, I, A, B, P)                                                      \
  template <>                                                                                        \
  struct Product<T, N> {                                                                             \
    static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b, int adds) {         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" MOE_LAB_S##I \
                   "}, " A ", " B ", p, 1, 1, 0, 0;\n}"                                              \
                   : MOE_LAB_D##I(d)                                                                 \
                   : "l"(a), "l"(b), "r"(adds));                                                     \
    }                                                                                                \
  };
#define MOE_LAB_PRODUCTS(T, NAME)                        \
  MOE_LAB_PRODUCT(T, NAME, 16, 0, "%8", "%9", "%10")     \
  MOE_LAB_PRODUCT(T, NAME, 32, 1, "%16", "%17", "%18")   \
  MOE_LAB_PRODUCT(T, NAME, 48, 2, "%24", "%25", "%26")   \
  MOE_LAB_PRODUCT(T, NAME, 64, 3, "%32", "%33", "%34")   \
  MOE_LAB_PRODUCT(T, NAME, 80, 4, "%40", "%41", "%42")   \
  MOE_LAB_PRODUCT(T, NAME, 96, 5, "%48", "%49", "%50")   \
  MOE_LAB_PRODUCT(T, NAME, 112, 6, "%56", "%57", "%58")  \
  MOE_LAB_PRODUCT(T, NAME, 128, 7, "%64", "%65", "%66")  \
  MOE_LAB_PRODUCT(T, NAME, 144, 8, "%72", "%73", "%74")  \
  MOE_LAB_PRODUCT(T, NAME, 160, 9, "%80", "%81", "%82")  \
  MOE_LAB_PRODUCT(T, NAME, 176, 10, "%88", "%89", "%90") \
  MOE_LAB_PRODUCT(T, NAME, 192, 11, "%96", "%97", "%98")
MOE_LAB_PRODUCTS(__nv_bfloat16, "bf16")
MOE_LAB_PRODUCTS(__half, "f16")

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 two = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}

__device__ __forceinline__ float2 two(uint32_t v, __nv_bfloat16) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
}
__device__ __forceinline__ float2 two(uint32_t v, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(v));
}

// Eight products, added to two sums.
template <class T>
__device__ __forceinline__ void multiply(float2& sum, const uint4& a, const uint4& b) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = two(as[i], T()), q = two(bs[i], T());
    sum.x = fmaf(p.x, q.x, sum.x), sum.y = fmaf(p.y, q.y, sum.y);
  }
}

}  // namespace moe_lab
