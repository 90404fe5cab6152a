// The ops torch.ops.moe_lab.{sort,combine,experts}.
#include "experts.h"

#include <algorithm>

#include "combine.h"
#include "ops.h"

namespace moe_lab {
namespace {

CombineArguments combine_arguments(const Tensor& o, const std::optional<Tensor>& inverse, const Tensor& ids,
                                   const std::optional<Tensor>& weights, Tensor& y) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  STD_TORCH_CHECK((o.dim() == 2 || o.dim() == 3) && o.is_contiguous(),
                  "o: must be [N, D] or [pieces, N, D], contiguous");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.is_contiguous() && ids.device() == o.device() &&
                      (ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Bool),
                  "ids: must be [T, K], int32 or bool (whether a slot is used), contiguous, on the device of o");
  CombineArguments a = {};
  a.o = o.data_ptr();
  a.T = ids.size(0);
  const int64_t slots = ids.numel(), pieces = o.dim() == 3 ? o.size(0) : 1, D = o.size(o.dim() - 1);
  a.rows = o.size(o.dim() - 2);
  STD_TORCH_CHECK(pieces >= 1, "o: must have at least one piece");
  STD_TORCH_CHECK(slots <= kMost && D <= kMost && ids.size(1) * pieces <= kMost,
                  "T * K, D and K * pieces must be < 2**31");
  a.K = static_cast<int>(ids.size(1)), a.D = static_cast<int>(D), a.pieces = static_cast<int>(pieces);
  if (ids.scalar_type() == ScalarType::Bool) {
    a.used = static_cast<const bool*>(ids.data_ptr());
  } else {
    a.ids = static_cast<const int32_t*>(ids.data_ptr());
  }
  if (inverse.has_value()) {
    STD_TORCH_CHECK(inverse->scalar_type() == ScalarType::Int && inverse->numel() == slots &&
                        inverse->is_contiguous() && inverse->device() == o.device(),
                    "inverse: must be int32 with T * K elements, contiguous, on the device of o");
    a.inverse = static_cast<const int32_t*>(inverse->data_ptr());
  } else {
    STD_TORCH_CHECK(a.rows >= slots, "o: without inverse there must be a row for each of the ", slots, " slots");
  }
  if (weights.has_value()) {
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float && weights->numel() == slots &&
                        weights->is_contiguous() && weights->device() == o.device(),
                    "weights: must be float32 with T * K elements, contiguous, on the device of o");
    a.weights = static_cast<const float*>(weights->data_ptr());
  }
  STD_TORCH_CHECK(y.numel() == a.T * D && y.is_contiguous() && y.device() == o.device(),
                  "y: must be [T, D], contiguous, on the device of o");
  a.dtype = dtype_of(o.scalar_type(), "o"), a.y_dtype = dtype_of(y.scalar_type(), "y");
  a.y = y.mutable_data_ptr();
  return a;
}

// Slots that are sorted already; all or none.
struct Sorted {
  const std::optional<Tensor>&offsets, &perm, &inverse;
};

struct ExpertsTensors {
  const Tensor &x, &ids, &weights, &w_gate_up, &w_down;
  const std::optional<Tensor>&gate_up_bias, &down_bias;
};

ExpertsArguments experts_arguments(const ExpertsTensors& in, const std::string& activation, bool scales_input,
                                   const Tiles& tiles, Tensor& y) {
  const auto is = [&](const Tensor& tensor, int64_t dim, ScalarType dtype) {
    return tensor.dim() == dim && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
           tensor.device() == in.x.device() && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  };
  const ScalarType dtype = in.x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "x: must be float16 or bfloat16");
  STD_TORCH_CHECK(
      is(in.x, 2, dtype) && is(in.w_gate_up, 3, dtype) && is(in.w_down, 3, dtype),
      "x, w_gate_up and w_down: must be [T, D], [E, 2F, D] and [E, D, F] of one dtype and device, contiguous, "
      "aligned to 16 bytes");
  ExpertsArguments a = {};
  const int64_t T = in.x.size(0), D = in.x.size(1), E = in.w_down.size(0), F = in.w_down.size(2);
  STD_TORCH_CHECK(
      in.w_down.size(1) == D && in.w_gate_up.size(0) == E && in.w_gate_up.size(1) == 2 * F && in.w_gate_up.size(2) == D,
      "w_gate_up and w_down: must be [E, 2F, D] and [E, D, F] for x [T, D]");
  STD_TORCH_CHECK(D % 16 == 0 && F % 16 == 0 && D > 0 && F > 0, "D=", D, " and F=", F, ": must be multiples of 16");
  STD_TORCH_CHECK(1 <= E && E <= kMaxExperts, "E=", E, ": must be between 1 and ", kMaxExperts);
  STD_TORCH_CHECK(in.ids.dim() == 2 && in.ids.size(0) == T && in.ids.scalar_type() == ScalarType::Int &&
                      in.ids.is_contiguous() && in.ids.device() == in.x.device(),
                  "ids: must be int32 [T, K], contiguous");
  const int64_t K = in.ids.size(1);
  STD_TORCH_CHECK(in.weights.dim() == 2 && in.weights.size(0) == T && in.weights.size(1) == K &&
                      in.weights.scalar_type() == ScalarType::Float && in.weights.is_contiguous() &&
                      in.weights.device() == in.x.device(),
                  "weights: must be float32 [T, K], contiguous");
  constexpr int64_t kMost = int64_t{1} << 31;
  STD_TORCH_CHECK(
      T * K < kMost && T * (D / 8) < kMost && D < kMost && F < kMost / 2 && (!scales_input || T * K * (D / 8) < kMost),
      "T * K, T * D / 8 and F must be < 2**31");
  const auto bias = [&](const std::optional<Tensor>& tensor, int64_t width) -> const float* {
    if (!tensor.has_value()) return nullptr;
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == E && tensor->size(1) == width &&
                        tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                        tensor->device() == in.x.device(),
                    "gate_up_bias and down_bias: must be float32 [E, 2F] and [E, D], contiguous");
    return static_cast<const float*>(tensor->data_ptr());
  };
  STD_TORCH_CHECK(activation == "silu" || activation == "clamped", "activation=", activation,
                  ": must be silu or clamped");
  const auto known = [](int rows, int tokens) {
    return rows == 128   ? tokens % 16 == 0 && 0 < tokens && tokens <= 64
           : rows == 256 ? tokens % 32 == 0 && 0 < tokens && tokens <= 192
                         : false;
  };
  const bool one = tiles.up_rows == 1 && tiles.up_tokens == 1 && tiles.down_rows == 1 && tiles.down_tokens == 1;
  STD_TORCH_CHECK(
      one || (known(tiles.up_rows, tiles.up_tokens) && known(tiles.down_rows, tiles.down_tokens)),
      "tiles: must have 128 rows and 16, 32, 48 or 64 tokens, or 256 rows and 32, 64, ... or 192 tokens, or "
      "be 1, 1, 1, 1");
  STD_TORCH_CHECK(!one || (T <= 1 && K <= kMostSlotsOfOne && D <= kMostVectorsOfOne && K * F <= kMostVectorsOfOne),
                  "tiles=1, 1, 1, 1: must have one token, at most ", kMostSlotsOfOne, " slots, and at most ",
                  kMostVectorsOfOne, " for D and K * F");
  STD_TORCH_CHECK(1 <= tiles.pieces && tiles.pieces <= 64 && (tiles.pieces == 1 || tiles.down_rows == 128),
                  "pieces: must be between 1 and 64, and 1 where down_rows is 256");
  a.x = in.x.data_ptr(), a.w_gate_up = in.w_gate_up.data_ptr(), a.w_down = in.w_down.data_ptr();
  a.ids = static_cast<const int32_t*>(in.ids.data_ptr());
  a.weights = static_cast<const float*>(in.weights.data_ptr());
  a.gate_up_bias = bias(in.gate_up_bias, 2 * F), a.down_bias = bias(in.down_bias, D);
  a.y = y.mutable_data_ptr();
  a.T = T, a.K = static_cast<int>(K), a.E = static_cast<int>(E), a.D = static_cast<int>(D), a.F = static_cast<int>(F);
  a.dtype = dtype_of(dtype, "x");
  a.activation = activation == "silu" ? Activation::kSilu : Activation::kClamped;
  a.scales_input = scales_input;
  a.tiles = tiles;
  // No piece of the sum may be empty; a piece has whole steps of 64.
  const int64_t steps = (F + 63) / 64, each = (steps + tiles.pieces - 1) / tiles.pieces;
  a.tiles.pieces = static_cast<int>((steps + each - 1) / each);
  return a;
}

void run_sort_cpu(const int32_t* ids, SortArguments& s, int E, int64_t slots, const Tensor&) {
  sort_cpu(ids, s, E, slots);
}

void run_combine_cpu(const CombineArguments& a, const Tensor&) { combine_cpu(a); }

void run_experts_cpu(ExpertsArguments a, const Tensor&, const Sorted&) { experts_cpu(a); }

#ifdef MOE_LAB_CUDA
void run_sort_cuda(const int32_t* ids, SortArguments& s, int E, int64_t slots, const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());
  const Device device = device_of(like.get_device_index());
  Tensor scratch = new_int32(like, sort_blocks(slots, device) * (E + 1));
  s.block_counts = static_cast<int32_t*>(scratch.mutable_data_ptr());
  check(sort_slots(ids, s, E, slots, device, true));
}

void run_combine_cuda(const CombineArguments& a, const Tensor& o) {
  const DeviceGuard guard(o.get_device_index());
  check(combine(a, device_of(o.get_device_index())));
}

void run_experts_cuda(ExpertsArguments a, const Tensor& x, const Sorted& sorted) {
#ifdef MOE_LAB_HOPPER
  const int index = x.get_device_index();
  const DeviceGuard guard(index);
  const Device device = device_of(index);
  STD_TORCH_CHECK(device.is_sm_90, "x: the kernels need compute capability 9.0");
  if (a.slots() == 0) {
    if (a.T > 0) check(cudaMemsetAsync(a.y, 0, a.T * a.D * 2, device.stream));
    return;
  }
  // All of it lives on the stream's order of allocations, so it may go when this returns.
  std::optional<Tensor> counts, own_offsets, own_perm, own_inverse;
  const auto take = [&](const Tensor& offsets, const Tensor& perm, const Tensor& inverse) {
    check_output(offsets, x, ScalarType::Int, a.E + 1, "offsets");
    check_output(perm, x, ScalarType::Int, a.slots(), "perm");
    check_output(inverse, x, ScalarType::Int, a.slots(), "inverse");
    a.offsets = static_cast<const int32_t*>(offsets.data_ptr());
    a.perm = static_cast<const int32_t*>(perm.data_ptr());
    a.inverse = static_cast<const int32_t*>(inverse.data_ptr());
  };
  if (!a.sorts_itself() && sorted.offsets.has_value()) {
    take(*sorted.offsets, *sorted.perm, *sorted.inverse);
  } else if (!a.sorts_itself()) {
    counts = new_int32(x, a.E), own_offsets = new_int32(x, a.E + 1);
    own_perm = new_int32(x, a.slots()), own_inverse = new_int32(x, a.slots());
    SortArguments s = sort_arguments(a.E, a.slots(), x, *counts, *own_offsets, *own_perm, *own_inverse);
    run_sort_cuda(a.ids, s, a.E, a.slots(), x);
    take(*own_offsets, *own_perm, *own_inverse);
  }
  std::optional<Tensor> rows, rows_copied;
  if (a.copies_rows()) {
    rows = torch::stable::new_empty(x, {a.slots(), a.D});
    a.rows = rows->mutable_data_ptr();
  }
  if (a.rows_are_sorted()) {
    rows_copied = new_int32(x, counts_of_rows(a.slots()));
    a.rows_copied = static_cast<int32_t*>(rows_copied->mutable_data_ptr());
  }
  Tensor h = torch::stable::new_empty(x, {a.slots(), a.F});
  a.h = h.mutable_data_ptr();
  std::optional<Tensor> o;
  if (!a.tiles.of_one_token()) {
    o = a.tiles.pieces > 1 ? torch::stable::new_empty(x, {a.tiles.pieces, a.slots(), a.D}, ScalarType::Float)
                           : torch::stable::new_empty(x, {a.slots(), a.D});
    a.o = o->mutable_data_ptr();
  }
  check(experts(a, device));
#else
  STD_TORCH_CHECK(false, "x: the kernels of the experts need compute capability 9.0");
#endif
}
#endif

// What follows is the same for both devices but for who computes.
using RunSort = void (*)(const int32_t*, SortArguments&, int, int64_t, const Tensor&);
using RunCombine = void (*)(const CombineArguments&, const Tensor&);
using RunExperts = void (*)(ExpertsArguments, const Tensor&, const Sorted&);

template <RunSort run>
void sort_out(const Tensor& ids, int64_t n_experts, Tensor counts, Tensor offsets, Tensor perm, Tensor inverse) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int && ids.is_contiguous() && ids.numel() < (int64_t{1} << 31),
                  "ids: must be int32, contiguous, with fewer than 2**31 elements");
  STD_TORCH_CHECK(1 <= n_experts && n_experts <= kMaxExperts, "n_experts=", n_experts, ": must be between 1 and ",
                  kMaxExperts);
  SortArguments s = sort_arguments(n_experts, ids.numel(), ids, counts, offsets, perm, inverse);
  run(static_cast<const int32_t*>(ids.data_ptr()), s, static_cast<int>(n_experts), ids.numel(), ids);
}

template <RunSort run>
Four sort(const Tensor& ids, int64_t n_experts) {
  Tensor counts = new_int32(ids, n_experts), offsets = new_int32(ids, n_experts + 1);
  Tensor perm = new_int32(ids, ids.numel()), inverse = new_int32(ids, ids.numel());
  sort_out<run>(ids, n_experts, counts, offsets, perm, inverse);
  return {counts, offsets, perm, inverse};
}

template <RunCombine run>
void combine_op_out(const Tensor& o, std::optional<Tensor> inverse, const Tensor& ids, std::optional<Tensor> weights,
                    Tensor y) {
  run(combine_arguments(o, inverse, ids, weights, y), o);
}

template <RunCombine run>
Tensor combine_op(const Tensor& o, std::optional<Tensor> inverse, const Tensor& ids, std::optional<Tensor> weights,
                  ScalarType dtype) {
  STD_TORCH_CHECK(o.dim() >= 2 && ids.dim() == 2, "o: must be [N, D] or [pieces, N, D], and ids [T, K]");
  Tensor y = torch::stable::new_empty(o, {ids.size(0), o.size(o.dim() - 1)}, dtype);
  combine_op_out<run>(o, inverse, ids, weights, y);
  return y;
}

template <RunExperts run>
void experts_op_out(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w_gate_up,
                    const Tensor& w_down, std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                    std::optional<Tensor> offsets, std::optional<Tensor> perm, std::optional<Tensor> inverse,
                    std::string activation, bool scales_input, int64_t up_rows, int64_t up_tokens, int64_t down_rows,
                    int64_t down_tokens, int64_t pieces, Tensor y) {
  STD_TORCH_CHECK(offsets.has_value() == perm.has_value() && perm.has_value() == inverse.has_value(),
                  "offsets, perm and inverse: give all of them, or none");
  STD_TORCH_CHECK(
      y.scalar_type() == x.scalar_type() && y.numel() == x.numel() && y.is_contiguous() && y.device() == x.device(),
      "y: must be as x, contiguous");
  const auto number = [](int64_t value) { return static_cast<int>(std::clamp<int64_t>(value, -1, 1 << 20)); };
  const Tiles tiles = {number(up_rows), number(up_tokens), number(down_rows), number(down_tokens), number(pieces)};
  run(experts_arguments({x, ids, weights, w_gate_up, w_down, gate_up_bias, down_bias}, activation, scales_input, tiles,
                        y),
      x, {offsets, perm, inverse});
}

template <RunExperts run>
Tensor experts_op(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w_gate_up,
                  const Tensor& w_down, std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                  std::optional<Tensor> offsets, std::optional<Tensor> perm, std::optional<Tensor> inverse,
                  std::string activation, bool scales_input, int64_t up_rows, int64_t up_tokens, int64_t down_rows,
                  int64_t down_tokens, int64_t pieces) {
  STD_TORCH_CHECK(x.dim() == 2, "x: must be [T, D]");
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  experts_op_out<run>(x, ids, weights, w_gate_up, w_down, gate_up_bias, down_bias, offsets, perm, inverse, activation,
                      scales_input, up_rows, up_tokens, down_rows, down_tokens, pieces, y);
  return y;
}

#define MOE_LAB_EXPERTS_SCHEMA                                                                                        \
  "(Tensor x, Tensor ids, Tensor weights, Tensor w_gate_up, Tensor w_down, Tensor? gate_up_bias, Tensor? down_bias, " \
  "Tensor? offsets, Tensor? perm, Tensor? inverse, str activation, bool scales_input, int up_rows, int up_tokens, "   \
  "int down_rows, int down_tokens, int pieces"

}  // namespace
}  // namespace moe_lab

STABLE_TORCH_LIBRARY_FRAGMENT(moe_lab, m) {
  m.def("sort(Tensor ids, int n_experts) -> (Tensor counts, Tensor offsets, Tensor perm, Tensor inverse)");
  m.def("sort.out(Tensor ids, int n_experts, *, Tensor(a!) counts, Tensor(b!) offsets, Tensor(c!) perm, "
        "Tensor(d!) inverse) -> ()");
  m.def("combine(Tensor o, Tensor? inverse, Tensor ids, Tensor? weights, ScalarType dtype) -> Tensor");
  m.def("combine.out(Tensor o, Tensor? inverse, Tensor ids, Tensor? weights, *, Tensor(a!) y) -> ()");
  m.def("experts" MOE_LAB_EXPERTS_SCHEMA ") -> Tensor");
  m.def("experts.out" MOE_LAB_EXPERTS_SCHEMA ", *, Tensor(a!) y) -> ()");
}

#define MOE_LAB_IMPLEMENT(m, half)                                                          \
  m.impl("sort", TORCH_BOX(&moe_lab::sort<&moe_lab::run_sort_##half>));                     \
  m.impl("sort.out", TORCH_BOX(&moe_lab::sort_out<&moe_lab::run_sort_##half>));             \
  m.impl("combine", TORCH_BOX(&moe_lab::combine_op<&moe_lab::run_combine_##half>));         \
  m.impl("combine.out", TORCH_BOX(&moe_lab::combine_op_out<&moe_lab::run_combine_##half>)); \
  m.impl("experts", TORCH_BOX(&moe_lab::experts_op<&moe_lab::run_experts_##half>));         \
  m.impl("experts.out", TORCH_BOX(&moe_lab::experts_op_out<&moe_lab::run_experts_##half>))

STABLE_TORCH_LIBRARY_IMPL(moe_lab, CPU, m) { MOE_LAB_IMPLEMENT(m, cpu); }
#ifdef MOE_LAB_CUDA
STABLE_TORCH_LIBRARY_IMPL(moe_lab, CUDA, m) { MOE_LAB_IMPLEMENT(m, cuda); }
#endif
