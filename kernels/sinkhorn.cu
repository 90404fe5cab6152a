#include "sinkhorn.cuh"

#include <algorithm>

namespace moe_lab {
namespace {

constexpr int padded(int E) { return E <= 8 ? 8 : 2 * padded((E + 1) / 2); }

template <int KP, int LANES, int VALUES>
cudaError_t run(const RouteArguments& a, const SinkhornArguments& s, int64_t blocks, const Device& device) {
  using Block = PlanBlock<KP, LANES, VALUES>;
  const int64_t each = ceil_div(a.T, blocks);
  const int64_t most = (device.shared_bytes - Block::bytes(0)) / (Block::bytes(1) - Block::bytes(0));
  // Rows that one warp looks at together are all stored, or none.
  const int64_t resident = s.iters == 0 ? 0 : each <= most ? each : most / (32 / LANES) * (32 / LANES);
  const Launch how{blocks, kSinkhornThreads, Block::bytes(resident), 1, s.partials != nullptr};
  return launch(sinkhorn_kernel<KP, LANES, VALUES>, how, device, a, s, static_cast<int>(each),
                static_cast<int>(resident));
}

}  // namespace

SinkhornGrid sinkhorn_grid(const RouteArguments& a, const Device& device) {
  constexpr int kAlone = 16384, kEach = 2048;  // elements of a block alone, and at least of one of several
  const int64_t elements = a.T * padded(a.E);
  if (elements <= kAlone) return {1, 0};
  const int64_t blocks = std::min<int64_t>(ceil_div(elements, kEach), device.multiprocessors);
  return {blocks, 2 * blocks * padded(a.E)};
}

cudaError_t sinkhorn(const RouteArguments& a, const SinkhornArguments& s, const Device& device) {
  const int64_t blocks = sinkhorn_grid(a, device).blocks;
  const int columns = padded(a.E);
  if (columns == 8) return run<8, 1, 8>(a, s, blocks, device);
  if (columns == 16) return run<8, 2, 8>(a, s, blocks, device);
  if (columns == 32) return run<8, 4, 8>(a, s, blocks, device);
  if (columns == 64) return run<8, 4, 16>(a, s, blocks, device);
  if (columns == 128) return run<8, 8, 16>(a, s, blocks, device);
  if (columns == 256) return run<8, 16, 16>(a, s, blocks, device);
  if (columns == 512) return run<0, 32, 16>(a, s, blocks, device);
  return run<0, 32, 32>(a, s, blocks, device);
}

}  // namespace moe_lab
