#include "experts_launch.cuh"

namespace moe_lab {

cudaError_t experts_down_fp16(const ExpertsArguments& a, const Device& device) {
  return launch_down<__half>(a, device);
}

}  // namespace moe_lab
