// The products of the expert MLPs, a file for each dtype: they compile side by side.
#pragma once

#include "cuda.h"
#include "experts.h"

namespace moe_lab {

cudaError_t experts_up_bf16(const ExpertsArguments& a, const Device& device);
cudaError_t experts_up_fp16(const ExpertsArguments& a, const Device& device);
cudaError_t experts_down_bf16(const ExpertsArguments& a, const Device& device);
cudaError_t experts_down_fp16(const ExpertsArguments& a, const Device& device);

}  // namespace moe_lab
