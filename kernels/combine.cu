// A warp computes 16 bytes a lane of a token's row, from the rows of its slots.
#include "cuda.h"
#include "route.cuh"

namespace moe_lab {
namespace {

constexpr int kInFlight = 8;  // loads of a lane under way together

template <Dtype DTYPE>
constexpr int kBytes = DTYPE == Dtype::kFloat32 ? 4 : 2;

// Elements of a lane. Not WIDE: one, for any D and any address.
template <Dtype DTYPE, bool WIDE>
constexpr int kEach = WIDE ? 16 / kBytes<DTYPE> : 1;

// Past the L1 cache: nothing is read twice.
template <Dtype DTYPE, bool WIDE>
__device__ __forceinline__ uint4 load(const void* from, int64_t at) {
  if constexpr (WIDE) {
    return __ldcg(reinterpret_cast<const uint4*>(static_cast<const char*>(from) + at * kBytes<DTYPE>));
  } else if constexpr (DTYPE == Dtype::kFloat32) {
    return {__ldcg(static_cast<const uint32_t*>(from) + at), 0, 0, 0};
  } else {
    return {__ldcg(static_cast<const uint16_t*>(from) + at), 0, 0, 0};
  }
}

template <Dtype DTYPE>
__device__ __forceinline__ float element(const uint4& loaded, int j) {
  const int at = j * kBytes<DTYPE> / 4;
  const uint32_t word = at == 0 ? loaded.x : at == 1 ? loaded.y : at == 2 ? loaded.z : loaded.w;
  if constexpr (DTYPE == Dtype::kFloat32) {
    return __uint_as_float(word);
  } else if constexpr (DTYPE == Dtype::kFloat16) {
    return __half2float(__ushort_as_half(j % 2 == 0 ? word & 0xffff : word >> 16));
  } else {
    return __uint_as_float(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
}

template <int EACH>
__device__ __forceinline__ void store(void* y, Dtype dtype, int64_t at, const float (&sum)[EACH]) {
  if (dtype == Dtype::kFloat32) {
    float* to = static_cast<float*>(y) + at;
    if constexpr (EACH == 1) {
      *to = sum[0];
    } else {
#pragma unroll
      for (int j = 0; j < EACH; j += 4)
        *reinterpret_cast<float4*>(to + j) = make_float4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3]);
    }
    return;
  }
  uint32_t bits[EACH];
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    bits[j] = dtype == Dtype::kFloat16 ? __half_as_ushort(__float2half_rn(sum[j]))
                                       : __bfloat16_as_ushort(__float2bfloat16_rn(sum[j]));
  }
  uint16_t* to = static_cast<uint16_t*>(y) + at;
  if constexpr (EACH == 1) {
    *to = static_cast<uint16_t>(bits[0]);
  } else if constexpr (EACH == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  } else {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16);
  }
}

// `chunks` warps a token. PIECES: there may be several.
template <Dtype DTYPE, bool WIDE, bool PIECES>
__global__ void __launch_bounds__(256) combine_kernel(const __grid_constant__ CombineArguments a, uint32_t chunks) {
  constexpr int EACH = kEach<DTYPE, WIDE>;
  const uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, token = warp / chunks;
  const int lane = threadIdx.x % 32, d = (warp % chunks * 32 + lane) * EACH, pieces = PIECES ? a.pieces : 1;
  wait_for_kernels_before();
  if (token >= a.T) return;
  float sum[EACH] = {}, row[EACH];
  for (int first_slot = 0; first_slot < a.K; first_slot += 32) {
    // Each lane reads what is known of one slot, and all of them hear of it.
    const int slots = min(a.K - first_slot, 32);
    int64_t slot = static_cast<int64_t>(token) * a.K + first_slot + lane;
    int its_row = -1;  // where it is known at once, loads of it do not wait for what tells whether it is used
    float its_weight = 1.0f;
    bool its_used = false;
    if (lane < slots) {
      its_used = a.ids != nullptr ? static_cast<uint32_t>(a.ids[slot]) < a.E : a.used[slot];
      its_row = a.inverse == nullptr ? static_cast<int>(slot) : its_used ? a.inverse[slot] : -1;
      if (a.weights != nullptr) its_weight = a.weights[slot];
    }
    for (int first = 0; first < slots * pieces; first += kInFlight) {
      uint4 loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int at = (first + i) / pieces, piece = (first + i) % pieces;
        const int from = __shfl_sync(kAll, its_row, at % 32);
        if (at < slots && from >= 0 && d < a.D) loaded[i] = load<DTYPE, WIDE>(a.o, (piece * a.rows + from) * a.D + d);
      }
      const uint32_t used = __ballot_sync(
          kAll,
          its_used);  // no load moves below it to where its value is used, which would make the loads wait in turn
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int at = (first + i) / pieces, piece = (first + i) % pieces;
        const float weight = __shfl_sync(kAll, its_weight, at % 32);
        if (at >= slots || (used >> at % 32 & 1) == 0) continue;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
          const float value = element<DTYPE>(loaded[i], j);
          row[j] = !PIECES || piece == 0 ? value : __fadd_rn(row[j], value);
          if (!PIECES || piece == pieces - 1) sum[j] = __fadd_rn(sum[j], __fmul_rn(weight, row[j]));
        }
      }
    }
  }
  if (d < a.D) store<EACH>(a.y, a.y_dtype, static_cast<int64_t>(token) * a.D + d, sum);
}

template <Dtype DTYPE, bool WIDE, bool PIECES>
cudaError_t run(const CombineArguments& a, const Device& device) {
  const int64_t chunks = ceil_div(a.D, 32 * kEach<DTYPE, WIDE>), warps = a.T * chunks;
  if (warps >= int64_t{1} << 27) return cudaErrorInvalidValue;        // threads are counted by 32 bits
  const int threads = warps < 8 * device.multiprocessors ? 32 : 256;  // few warps: spread over the multiprocessors
  return launch(combine_kernel<DTYPE, WIDE, PIECES>, {ceil_div(warps * 32, threads), threads}, device, a,
                static_cast<uint32_t>(chunks));
}

template <Dtype DTYPE>
cudaError_t run(const CombineArguments& a, const Device& device) {
  const bool wide = a.D % kEach<DTYPE, true> == 0 && reinterpret_cast<uintptr_t>(a.o) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(a.y) % 16 == 0;
  if (a.pieces == 1) return wide ? run<DTYPE, true, false>(a, device) : run<DTYPE, false, false>(a, device);
  return wide ? run<DTYPE, true, true>(a, device) : run<DTYPE, false, true>(a, device);
}

}  // namespace

cudaError_t combine(const CombineArguments& a, const Device& device) {
  if (a.T == 0 || a.D == 0) return cudaSuccess;
  if (a.dtype == Dtype::kFloat32) return run<Dtype::kFloat32>(a, device);
  return a.dtype == Dtype::kFloat16 ? run<Dtype::kFloat16>(a, device) : run<Dtype::kBFloat16>(a, device);
}

}  // namespace moe_lab
