// The products of the expert MLPs, a file for each dtype (they compile side by side), and those of one token.
#pragma once

#include <algorithm>

#include "cuda.h"
#include "experts.h"
#include "hopper.cuh"

namespace moe_lab {

cudaError_t experts_up_bf16(const ExpertsArguments& a, const Device& device);
cudaError_t experts_up_fp16(const ExpertsArguments& a, const Device& device);
cudaError_t experts_down_bf16(const ExpertsArguments& a, const Device& device);
cudaError_t experts_down_fp16(const ExpertsArguments& a, const Device& device);

// Of the L2 cache, for weights that are read once: they need no place there. If they take one, memory writes what stood
// in it meanwhile: OLMoE's shape at T = 1 takes 46 us in place of 41 on an H200. Between 2 and 128 times as many bytes
// as the cache has are slower so, by 1 to 5 % (139 us in place of 137 at T = 8); more, faster by 1 %.
inline uint64_t policy_of_weights(const ExpertsArguments& a, const Device& device) {
  const int64_t bytes = std::min<int64_t>(a.slots(), a.E) * 6 * a.D * a.F;
  return bytes <= 2 * device.l2_bytes || bytes >= 128 * device.l2_bytes ? kGoFirst : kStay;
}

cudaError_t experts_one_token(const ExpertsArguments& a, const Device& device);

}  // namespace moe_lab
