// Routes that rank scores, or limit groups.
#include "route_kernels.cuh"

namespace moe_lab {

cudaError_t route_by_scores(const RouteArguments& a, const SortArguments* s, const Device& device) {
  MOE_LAB_RUN_IF(8, 8, 8, true);
  MOE_LAB_RUN_IF(8, 8, 16, true);
  MOE_LAB_RUN_IF(8, 16, 16, true);
  MOE_LAB_RUN_IF(8, 16, 24, true);
  return run_by_warps<true>(a, s, device);
}

}  // namespace moe_lab
