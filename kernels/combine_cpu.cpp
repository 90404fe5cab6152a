// combine on a CPU: tokens in parallel, a slot's row after the other.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "combine.h"

namespace moe_lab {
namespace {

void load(const CombineArguments& a, int64_t piece, int64_t row, float* x) {
  const int64_t at = (piece * a.rows + row) * a.D;
  if (a.dtype == Dtype::kFloat32) {
    std::memcpy(x, static_cast<const float*>(a.o) + at, a.D * sizeof(float));
  } else if (a.dtype == Dtype::kFloat16) {
    const auto* from = static_cast<const c10::Half*>(a.o) + at;
    for (int d = 0; d < a.D; ++d) x[d] = from[d];
  } else {
    const auto* from = static_cast<const c10::BFloat16*>(a.o) + at;
    for (int d = 0; d < a.D; ++d) x[d] = from[d];
  }
}

void store(const CombineArguments& a, int64_t t, const float* x) {
  const int64_t at = t * a.D;
  if (a.y_dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(a.y) + at, x, a.D * sizeof(float));
  } else if (a.y_dtype == Dtype::kFloat16) {
    std::copy_n(x, a.D, static_cast<c10::Half*>(a.y) + at);
  } else {
    std::copy_n(x, a.D, static_cast<c10::BFloat16*>(a.y) + at);
  }
}

// Products are rounded before they are summed: each loop stores its result, so that no compiler makes one instruction
// of both, and the bits are those of the CUDA kernel.
void multiply(std::vector<float>& x, float factor) {
  for (float& value : x) value *= factor;
}

void add(std::vector<float>& sum, const std::vector<float>& x) {
  for (size_t d = 0; d < sum.size(); ++d) sum[d] += x[d];
}

}  // namespace

void combine_cpu(const CombineArguments& a) {
  const int64_t work = std::max<int64_t>(1, int64_t{a.K} * a.D * a.pieces);
  torch::stable::parallel_for(0, a.T, std::max<int64_t>(1, 32768 / work), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(a.D), row(a.D), piece(a.D);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t slot = t * a.K; slot < (t + 1) * a.K; ++slot) {
        if (!(a.ids != nullptr ? static_cast<uint32_t>(a.ids[slot]) < a.E : a.used[slot])) continue;
        const int64_t from = a.inverse != nullptr ? a.inverse[slot] : slot;
        load(a, 0, from, row.data());
        for (int p = 1; p < a.pieces; ++p) load(a, p, from, piece.data()), add(row, piece);
        if (a.weights != nullptr) multiply(row, a.weights[slot]);
        add(sum, row);
      }
      store(a, t, sum.data());
    }
  });
}

}  // namespace moe_lab
