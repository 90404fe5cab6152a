// Routes that rank the logits.
#include "route_kernels.cuh"

namespace moe_lab {

cudaError_t route_by_logits(const RouteArguments& a, const SortArguments* s, const Device& device) {
  const bool many = a.T > 2048;  // rows enough that fewer lanes each are faster
  if (many) MOE_LAB_RUN_IF(2, 1, 8, false);
  MOE_LAB_RUN_IF(2, 2, 4, false);
  MOE_LAB_RUN_IF(4, 4, 4, false);
  MOE_LAB_RUN_IF(4, 4, 8, false);
  MOE_LAB_RUN_IF(8, 4, 8, false);
  if (many) MOE_LAB_RUN_IF(8, 4, 16, false);
  MOE_LAB_RUN_IF(8, 8, 8, false);
  MOE_LAB_RUN_IF(8, 8, 16, false);
  MOE_LAB_RUN_IF(8, 16, 16, false);
  MOE_LAB_RUN_IF(8, 16, 24, false);
  MOE_LAB_RUN_IF(16, 16, 32, false);
  return run_by_warps<false>(a, s, device);
}

}  // namespace moe_lab
