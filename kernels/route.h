// What a router computes from logits, and the slots sorted by expert: what the ops ask of the CUDA and the C++ kernels.
#pragma once

#include <cstdint>

namespace moe_lab {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;
constexpr int kMaxGroups = 32;

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };
enum class Score : int { kSoftmax, kSigmoid, kSqrtSoftplus };

// Ids and weights of the k best of a + b, a = score(logits + gate bias) and b the bias, within the best groups. Where
// nothing is added to the scores the logits are ranked, whose small differences the scores would lose.
struct RouteArguments {
  const void* logits;      // [T, E], rows `row_stride` elements apart
  const float* gate_bias;  // [E], or null
  const float* bias;       // [E], to choose and never to weigh, or null
  int32_t* ids;            // [T, k]
  float* weights;          // [T, k]
  int64_t row_stride;
  int64_t T;
  int E, k;
  Dtype dtype;
  bool aligned;  // E and the rows are multiples of four elements, and the first lies on a boundary of four
  Score score;
  int n_groups, top_groups, group_size;
  bool group_top2;  // a group's score is the sum of its two largest, not the largest
  bool renormalize;
  float scale;

  constexpr bool grouped() const { return top_groups < n_groups; }
  constexpr bool ranks_scores() const { return bias != nullptr || (grouped() && group_top2); }
};

// The slots of ids [T, k], flat, sorted by expert and within an expert by slot, the unused ones last. All int32.
struct SortArguments {
  int32_t* counts;        // [E]
  int32_t* offsets;       // [E + 1], the last one is the number of used slots
  int32_t* perm;          // [slots], the flat slot at each sorted position
  int32_t* inverse;       // [slots], the sorted position of each flat slot
  int32_t* block_counts;  // scratch of the CUDA kernels, [sort_blocks, E], or E + 1 with unused slots
};

constexpr int kMostGateTokens = 32;  // of more than `kFewExperts`
constexpr int kFewExperts = 8;

// The logits as a product, in the dtype of the logits: x [T, D] and gate [E, D], in 16 bytes at a time.
struct GateArguments {
  const void* x;
  const void* gate;
  int64_t x_stride, gate_stride;
  int D;
};

constexpr int kMostNormWidth = 8192, kMostNormExperts = 256;
constexpr int64_t kMostNormGate = 1 << 20;  // elements: what the multiprocessors of one cluster read in time

// The logits of a few tokens as such a product with the norm of x + residual, all in one dtype (ops/add_rms_norm.py).
struct NormGateArguments {
  const void *x, *residual, *norm_weight, *gate;  // [T, D], [T, D], [D], [E, D]
  void *normed, *total;                           // [T, D]
  float eps;
  int D;
};

// Beside ids and weights, the k largest of a balanced plan weighed by the softmax of their logits (ops/sinkhorn.py).
struct SinkhornArguments {
  int iters;
  float log2e_by_temperature;
  float tolerance;  // the columns are scaled until all lie within this share of T/E
  float* log_b;     // [E], the columns' scale, natural logarithm
  float* partials;  // scratch of the CUDA kernels; null: there is one block
};

void route_cpu(const RouteArguments& a);
// An id outside [0, E) is an unused slot.
void sort_cpu(const int32_t* ids, const SortArguments& s, int E, int64_t slots);
void sinkhorn_cpu(const RouteArguments& a, const SinkhornArguments& s);

}  // namespace moe_lab
