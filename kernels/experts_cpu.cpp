// The expert MLPs on a CPU, slot by slot, with the roundings of the CUDA kernels: h and o to the dtype (o not where it
// comes in pieces). For tests: it is slow.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <vector>

#include "experts.h"

namespace moe_lab {
namespace {

float activate(Activation activation, float gate, float up) {
  if (activation == Activation::kSilu) return gate / (1.0f + std::exp(-gate)) * up;
  gate = gate > kClamp ? kClamp : gate;
  up = up > kClamp ? kClamp : up < -kClamp ? -kClamp : up;
  return gate / (1.0f + std::exp(-kClampedSlope * gate)) * (up + 1.0f);
}

template <class T>
float dot(const T* a, const T* b, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return sum;
}

template <class T>
void experts_of(const ExpertsArguments& a) {
  const int64_t D = a.D, F = a.F;
  std::vector<T> x(D), h(F);
  std::vector<float> sum(D);
  for (int64_t t = 0; t < a.T; ++t) {
    sum.assign(D, 0.0f);
    for (int64_t slot = t * a.K; slot < (t + 1) * a.K; ++slot) {
      const int64_t e = a.ids[slot];
      if (e < 0 || e >= a.E) continue;
      const T* const from = static_cast<const T*>(a.x) + t * D;
      for (int64_t d = 0; d < D; ++d) {
        x[d] = a.scales_input ? static_cast<T>(static_cast<float>(from[d]) * a.weights[slot]) : from[d];
      }
      const T* const w_gate = static_cast<const T*>(a.w_gate_up) + e * 2 * F * D;
      const float* const bias = a.gate_up_bias == nullptr ? nullptr : a.gate_up_bias + e * 2 * F;
      for (int64_t f = 0; f < F; ++f) {
        const float gate = dot(x.data(), w_gate + f * D, a.D) + (bias == nullptr ? 0.0f : bias[f]);
        const float up = dot(x.data(), w_gate + (F + f) * D, a.D) + (bias == nullptr ? 0.0f : bias[F + f]);
        h[f] = static_cast<T>(activate(a.activation, gate, up));
      }
      const T* const w_down = static_cast<const T*>(a.w_down) + e * D * F;
      for (int64_t d = 0; d < D; ++d) {
        float o = dot(h.data(), w_down + d * F, a.F) + (a.down_bias == nullptr ? 0.0f : a.down_bias[e * D + d]);
        if (a.tiles.pieces == 1) o = static_cast<float>(static_cast<T>(o));
        sum[d] += a.scales_input ? o : a.weights[slot] * o;
      }
    }
    for (int64_t d = 0; d < D; ++d) static_cast<T*>(a.y)[t * D + d] = static_cast<T>(sum[d]);
  }
}

}  // namespace

void experts_cpu(const ExpertsArguments& a) {
  if (a.dtype == Dtype::kBFloat16) {
    experts_of<c10::BFloat16>(a);
  } else {
    experts_of<c10::Half>(a);
  }
}

}  // namespace moe_lab
