#include "experts_launch.cuh"

namespace moe_lab {

cudaError_t experts_up_bf16(const ExpertsArguments& a, const Device& device) {
  if (a.activation == Activation::kClamped) return launch_up<__nv_bfloat16, Activation::kClamped>(a, device);
  return launch_up<__nv_bfloat16, Activation::kSilu>(a, device);
}

}  // namespace moe_lab
