#include "experts_launch.cuh"

namespace moe_lab {

cudaError_t experts_down_bf16(const ExpertsArguments& a, const Device& device) {
  return launch_down<__nv_bfloat16>(a, device);
}

}  // namespace moe_lab
