// The ops torch.ops.moe_lab.{route,route_and_sort,sinkhorn_route,gate_route,norm_gate_route,sort,combine,experts,
// hopper_gemv,hopper_attention}, on torch's stable ABI: one binary for several versions of torch.
//
// Without MOE_LAB_CUDA only the C++ half is here. All outputs are made or given by the caller, nothing is read on the
// host, and all work is put on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "combine.h"
#include "decode.h"
#include "experts.h"
#include "route.h"
#ifdef MOE_LAB_CUDA
#include <mutex>
#include <vector>

#include <dlfcn.h>

#include "cuda.h"
#endif

namespace moe_lab {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Dtype dtype_of(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name,
                  ": must be float32, float16 or bfloat16");
  return dtype == ScalarType::Float ? Dtype::kFloat32 : dtype == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

const float* bias_of(const std::optional<Tensor>& bias, const Tensor& logits, const char* name) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == logits.size(1) && bias->scalar_type() == ScalarType::Float &&
                      bias->is_contiguous() && bias->device() == logits.device(),
                  name, ": must be float32 [E], contiguous, on the device of the input");
  return static_cast<const float*>(bias->data_ptr());
}

void check_output(const Tensor& output, const Tensor& input, ScalarType dtype, int64_t elements, const char* name) {
  STD_TORCH_CHECK(output.scalar_type() == dtype && output.numel() == elements && output.is_contiguous() &&
                      output.device() == input.device(),
                  name, ": must be contiguous, on the device of the input, ",
                  dtype == ScalarType::Int ? "int32" : "float32", ", with ", elements, " elements");
}

RouteArguments arguments(const Tensor& logits, const std::optional<Tensor>& gate_bias,
                         const std::optional<Tensor>& bias, int64_t k, const std::string& score, int64_t n_groups,
                         int64_t top_groups, const std::string& group_score, bool renormalize, double scale,
                         Tensor& ids, Tensor& weights) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(0) < 2 || logits.stride(0) >= logits.size(1)) &&
                      (logits.size(0) == 0 || logits.size(1) < 2 || logits.stride(1) == 1),
                  "logits: must be [T, E] with stride 1 in the last dimension");
  RouteArguments a = {};
  const int64_t E = logits.size(1);
  STD_TORCH_CHECK(1 <= E && E <= kMaxExperts, "logits: E=", E, " must be between 1 and ", kMaxExperts);
  STD_TORCH_CHECK(1 <= k && k <= kMaxTopK && k <= E, "k=", k, ": must be between 1 and min(E, ", kMaxTopK, ")");
  STD_TORCH_CHECK(1 <= n_groups && n_groups <= kMaxGroups && E % n_groups == 0, "n_groups=", n_groups,
                  ": must divide E and be at most ", kMaxGroups);
  STD_TORCH_CHECK(1 <= top_groups && top_groups <= n_groups && top_groups * (E / n_groups) >= k,
                  "top_groups=", top_groups, ": must be at most n_groups and leave at least k experts");
  STD_TORCH_CHECK(group_score == "max" || group_score == "top2", "group_score=", group_score, ": must be max or top2");
  a.dtype = dtype_of(logits.scalar_type(), "logits");
  STD_TORCH_CHECK(score == "softmax" || score == "sigmoid" || score == "sqrt_softplus", "score=", score,
                  ": must be softmax, sigmoid or sqrt_softplus");
  a.logits = logits.data_ptr();
  a.gate_bias = bias_of(gate_bias, logits, "gate_bias");
  a.bias = bias_of(bias, logits, "bias");
  a.T = logits.size(0);
  a.row_stride = a.T < 2 ? E : logits.stride(0);
  a.E = static_cast<int>(E), a.k = static_cast<int>(k);
  STD_TORCH_CHECK(a.T * k < (int64_t{1} << 31), "logits: T * k must be < 2**31");
  const auto bytes_of_four = a.dtype == Dtype::kFloat32 ? 16 : 8;
  a.aligned = E % 4 == 0 && a.row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(a.logits) % bytes_of_four == 0 &&
              reinterpret_cast<uintptr_t>(a.bias) % 16 == 0;
  a.score = score == "softmax" ? Score::kSoftmax : score == "sigmoid" ? Score::kSigmoid : Score::kSqrtSoftplus;
  a.n_groups = static_cast<int>(n_groups), a.top_groups = static_cast<int>(top_groups);
  a.group_size = static_cast<int>(E / n_groups);
  a.group_top2 = group_score == "top2";
  a.renormalize = renormalize;
  a.scale = static_cast<float>(scale);
  check_output(ids, logits, ScalarType::Int, a.T * k, "ids");
  check_output(weights, logits, ScalarType::Float, a.T * k, "weights");
  a.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  a.weights = static_cast<float*>(weights.mutable_data_ptr());
  return a;
}

Tensor new_int32(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Int); }

struct Outputs {
  Tensor counts, offsets, perm, inverse;
};

SortArguments sort_arguments(int64_t E, int64_t slots, const Tensor& like, Outputs& out) {
  check_output(out.counts, like, ScalarType::Int, E, "counts");
  check_output(out.offsets, like, ScalarType::Int, E + 1, "offsets");
  check_output(out.perm, like, ScalarType::Int, slots, "perm");
  check_output(out.inverse, like, ScalarType::Int, slots, "inverse");
  auto data = [](Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  return {data(out.counts), data(out.offsets), data(out.perm), data(out.inverse), nullptr};
}

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

SinkhornArguments sinkhorn_arguments(const RouteArguments& a, const Tensor& logits, int64_t iters, double temperature,
                                     double tolerance, Tensor& log_b) {
  STD_TORCH_CHECK(iters >= 0 && iters < (int64_t{1} << 31) && temperature > 0 && tolerance >= 0,
                  "iters must be >= 0 and < 2**31, temperature > 0 and tolerance >= 0");
  check_output(log_b, logits, ScalarType::Float, a.E, "log_b");
  // Of one token the only balanced plan is uniform, and the logits are ranked.
  const int turns = a.T > 1 ? static_cast<int>(iters) : 0;
  return {turns, static_cast<float>(1.4426950408889634 / temperature), static_cast<float>(tolerance),
          static_cast<float*>(log_b.mutable_data_ptr()), nullptr};
}

void run_sinkhorn_cpu(const RouteArguments& a, SinkhornArguments& s, const Tensor&) { sinkhorn_cpu(a, s); }

void run_cpu(const RouteArguments& a, const SortArguments* s, const Tensor&) {
  route_cpu(a);
  if (s != nullptr) sort_cpu(a.ids, *s, a.E, a.T * a.k);
}

void run_sort_cpu(const int32_t* ids, SortArguments& s, int E, int64_t slots, const Tensor&) {
  sort_cpu(ids, s, E, slots);
}

void run_combine_cpu(const CombineArguments& a, const Tensor&) { combine_cpu(a); }

void run_experts_cpu(ExpertsArguments a, const Tensor&, const Sorted&) { experts_cpu(a); }

#ifdef MOE_LAB_CUDA
void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "moe_lab: CUDA: ", cudaGetErrorString(error)); }

// Of a function in libtorch_cuda, which a CPU build of torch does not have, so that nothing here is linked with it.
cudaStream_t current_stream(int index) {
  using Get = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda == nullptr ? nullptr
                                 : reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get != nullptr && get(index, &stream) == 0, "moe_lab: torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

Device device_of(int index) {
  static std::mutex mutex;
  static std::vector<Device> known;
  std::lock_guard<std::mutex> lock(mutex);
  while (known.size() <= static_cast<size_t>(index)) {
    const int next = static_cast<int>(known.size());
    int multiprocessors = 0, major = 0, minor = 0, shared_bytes = 0, l2_bytes = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, next));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, next));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, next));
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, next));
    check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, next));
    const int cluster = major < 9 ? 1 : major <= 10 ? 16 : 8;  // 8 is what every GPU with clusters allows
    known.push_back({nullptr, multiprocessors, major >= 9, major == 9 && minor == 0, cluster, shared_bytes, l2_bytes});
  }
  Device device = known[index];
  device.stream = current_stream(index);
  return device;
}

void run_cuda(const RouteArguments& a, const SortArguments* s, const Tensor& logits) {
  const int index = logits.get_device_index();
  const DeviceGuard guard(index);
  const Device device = device_of(index);
  SortArguments sort = {};
  std::optional<Tensor> scratch;  // lives on the stream's order of allocations, so it may go when this returns
  if (s != nullptr) {
    sort = *s;
    scratch = new_int32(logits, sort_blocks(a.T * a.k, device) * a.E);
    sort.block_counts = static_cast<int32_t*>(scratch->mutable_data_ptr());
  }
  if (a.T == 0) {
    if (s != nullptr) check(sort_slots(a.ids, sort, a.E, 0, device));
    return;
  }
  const bool by_scores = a.ranks_scores() || a.grouped();
  check((by_scores ? route_by_scores : route_by_logits)(a, s == nullptr ? nullptr : &sort, device));
}

void run_sinkhorn_cuda(const RouteArguments& a, SinkhornArguments& s, const Tensor& logits) {
  const DeviceGuard guard(logits.get_device_index());
  const Device device = device_of(logits.get_device_index());
  std::optional<Tensor> scratch;
  if (const int64_t floats = sinkhorn_grid(a, device).partials; floats > 0) {
    scratch = torch::stable::new_empty(logits, {floats}, ScalarType::Float);
    s.partials = static_cast<float*>(scratch->mutable_data_ptr());
  }
  check(sinkhorn(a, s, device));
}

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
  std::optional<Outputs> own;
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
    own = Outputs{new_int32(x, a.E), new_int32(x, a.E + 1), new_int32(x, a.slots()), new_int32(x, a.slots())};
    SortArguments s = sort_arguments(a.E, a.slots(), x, *own);
    run_sort_cuda(a.ids, s, a.E, a.slots(), x);
    take(own->offsets, own->perm, own->inverse);
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

void check_gate(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == x.size(1) && tensor.scalar_type() == x.scalar_type() &&
                      tensor.device() == x.device() && (tensor.size(1) < 2 || tensor.stride(1) == 1) &&
                      (tensor.size(0) < 2 || tensor.stride(0) % 8 == 0) &&
                      reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0,
                  name, ": must be 2-D with x's dtype, device and last dimension, with rows aligned to 16 bytes");
}

std::tuple<Tensor, Tensor> gate_route(const Tensor& x, const Tensor& gate, std::optional<Tensor> gate_bias,
                                      std::optional<Tensor> bias, int64_t k, std::string score, int64_t n_groups,
                                      int64_t top_groups, std::string group_score, bool renormalize, double scale) {
  check_gate(x, x, "x"), check_gate(gate, x, "gate");
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Float, "x: must be float16 or bfloat16");
  const Tensor logits = torch::stable::new_empty(x, {x.size(0), gate.size(0)});
  Tensor ids = torch::stable::new_empty(logits, {logits.size(0), k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(logits, {logits.size(0), k}, ScalarType::Float);
  const RouteArguments a =
      arguments(logits, gate_bias, bias, k, score, n_groups, top_groups, group_score, renormalize, scale, ids, weights);
  const GateArguments g = {x.data_ptr(), gate.data_ptr(), x.stride(0), gate.stride(0), static_cast<int>(x.size(1))};
  const DeviceGuard guard(x.get_device_index());
  const Device device = device_of(x.get_device_index());
  STD_TORCH_CHECK(can_route_by_gate(a, g, device), "x: must have at most ", kMostGateTokens, " tokens or ", kFewExperts,
                  " experts and D a multiple of 32, on compute capability 9.0 or newer");
  if (a.T > 0) check(route_by_gate(a, g, device));
  return {ids, weights};
}

Four norm_gate_route(const Tensor& x, const Tensor& residual, const Tensor& norm_weight, double eps, const Tensor& gate,
                     std::optional<Tensor> gate_bias, std::optional<Tensor> bias, int64_t k, std::string score,
                     int64_t n_groups, int64_t top_groups, std::string group_score, bool renormalize, double scale) {
  check_gate(x, x, "x"), check_gate(residual, x, "residual"), check_gate(gate, x, "gate");
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Float, "x: must be float16 or bfloat16");
  const int64_t T = x.size(0), D = x.size(1);
  STD_TORCH_CHECK(x.is_contiguous() && residual.is_contiguous() && residual.size(0) == T,
                  "x and residual: must be [T, D], contiguous");
  STD_TORCH_CHECK(gate.is_contiguous(), "gate: must be contiguous");
  STD_TORCH_CHECK(norm_weight.dim() == 1 && norm_weight.size(0) == D && norm_weight.scalar_type() == x.scalar_type() &&
                      norm_weight.is_contiguous() && norm_weight.device() == x.device() &&
                      reinterpret_cast<uintptr_t>(norm_weight.data_ptr()) % 16 == 0,
                  "norm_weight: must be [D] with x's dtype and device, contiguous, aligned to 16 bytes");
  const Tensor logits = torch::stable::new_empty(x, {T, gate.size(0)});  // for its shape: the kernel needs none
  Tensor normed = torch::stable::new_empty(x, {T, D}), total = torch::stable::new_empty(x, {T, D});
  Tensor ids = torch::stable::new_empty(x, {T, k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(x, {T, k}, ScalarType::Float);
  const RouteArguments a =
      arguments(logits, gate_bias, bias, k, score, n_groups, top_groups, group_score, renormalize, scale, ids, weights);
  const NormGateArguments g = {x.data_ptr(),
                               residual.data_ptr(),
                               norm_weight.data_ptr(),
                               gate.data_ptr(),
                               normed.mutable_data_ptr(),
                               total.mutable_data_ptr(),
                               static_cast<float>(eps),
                               static_cast<int>(D)};
  const DeviceGuard guard(x.get_device_index());
  const Device device = device_of(x.get_device_index());
  STD_TORCH_CHECK(can_norm_and_route(a, g, device), "x: must have at most ", kMostRows, " rows; gate: at most ",
                  kMostNormExperts, " experts and ", kMostNormGate, " elements, D a multiple of 8 and at most ",
                  kMostNormWidth, ", on compute capability 9.0 or newer");
  if (T > 0) check(norm_and_route(a, g, device));
  return {normed, total, ids, weights};
}
#endif

#ifdef MOE_LAB_HOPPER
// A tensor of 16 bits on the device of another, of these sizes, in one piece.
const void* piece(const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes, const char* name) {
  bool is_right = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == like.scalar_type() &&
                  tensor.is_contiguous() && tensor.device() == like.device();
  int64_t i = 0;
  for (const int64_t size : sizes) is_right = is_right && tensor.size(i++) == size;
  STD_TORCH_CHECK(is_right, name, ": has a shape, dtype, device or strides that the kernel does not take");
  return tensor.data_ptr();
}

const void* piece(const std::optional<Tensor>& tensor, const Tensor& like, std::initializer_list<int64_t> sizes,
                  const char* name) {
  return tensor.has_value() ? piece(*tensor, like, sizes, name) : nullptr;
}

// What is read 16 bytes at a time.
const void* aligned(const void* pointer, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, name, ": must begin on a boundary of 16 bytes");
  return pointer;
}

Device sm_90_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
                  "x: must be float16 or bfloat16");
  const Device device = device_of(x.get_device_index());
  STD_TORCH_CHECK(device.is_sm_90, "x: the kernels need compute capability 9.0");
  return device;
}

Tensor hopper_gemv(const Tensor& x, std::optional<Tensor> residual, std::optional<Tensor> norm, double eps,
                   const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> total) {
  const DeviceGuard guard(x.get_device_index());
  const Device device = sm_90_of(x);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(0) > 0,
                  "x and weight: must be [T, K] and [N, K], N at least 1");
  const int64_t T = x.size(0), N = weight.size(0), K = weight.size(1);
  STD_TORCH_CHECK(K > 0 && K % 8 == 0 && K <= (norm.has_value() ? kMostColumns : kMostColumnsAlone),
                  "weight: K must be a multiple of 8, at most ", norm.has_value() ? kMostColumns : kMostColumnsAlone);
  STD_TORCH_CHECK(T <= kMostRows && T * K <= kMostElements, "x: must have at most ", kMostRows, " rows and ",
                  kMostElements, " elements");
  STD_TORCH_CHECK(norm.has_value() == total.has_value() && (norm.has_value() || !residual.has_value()),
                  "total: goes with a norm, and so does a residual");
  Tensor y = torch::stable::new_empty(x, {T, N});
  const GemvArguments a = {aligned(piece(x, x, {T, K}, "x"), "x"),
                           aligned(piece(residual, x, {T, K}, "residual"), "residual"),
                           aligned(piece(norm, x, {K}, "norm"), "norm"),
                           aligned(piece(weight, x, {N, K}, "weight"), "weight"),
                           piece(bias, x, {N}, "bias"),
                           y.data_ptr(),
                           const_cast<void*>(aligned(piece(total, x, {T, K}, "total"), "total")),
                           static_cast<int>(T),
                           static_cast<int>(N),
                           static_cast<int>(K),
                           static_cast<float>(eps),
                           dtype_of(x.scalar_type(), "x")};
  if (T > 0) check(T == 1 ? gemv(a, device) : gemv_of_rows(a, device));
  return y;
}

Tensor hopper_attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> q_norm,
                        std::optional<Tensor> k_norm, double eps, double clip, const Tensor& cos, const Tensor& sin,
                        const Tensor& position, Tensor k_cache, Tensor v_cache, bool turn_first, int64_t window,
                        double scale, std::optional<Tensor> sinks) {
  const DeviceGuard guard(q.get_device_index());
  const Device device = sm_90_of(q);
  STD_TORCH_CHECK(k_cache.dim() == 4 && q.dim() == 2, "q: must be [B, H d], and the caches [B, H, N, d]");
  const int64_t B = k_cache.size(0), H = k_cache.size(1), N = k_cache.size(2), d = k_cache.size(3);
  STD_TORCH_CHECK(d == 64 || d == 128, "k_cache: d must be 64 or 128");
  const bool of_head = q_norm.has_value() && q_norm->size(0) == d && H > 1;
  const auto row_of = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == B && x.size(1) == H * d && x.stride(1) == 1 && x.stride(0) % 8 == 0 &&
                        x.scalar_type() == q.scalar_type() && x.device() == q.device() &&
                        reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
                    name, ": must be [B, H d] of 16 bits, with rows on boundaries of 16 bytes");
    return x.stride(0);
  };
  const auto cache_of = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == B && x.size(1) == H && x.size(2) == N && x.size(3) == d &&
                        x.stride(3) == 1 && x.stride(2) == d && x.stride(1) == N * d &&
                        x.stride(0) == k_cache.stride(0) && x.scalar_type() == q.scalar_type() &&
                        x.device() == q.device() && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
                    name, ": must be [B, H, N, d] of q's dtype, the positions of a head together");
    return x.data_ptr();
  };
  const auto table_of = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(
        x.numel() == d && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.device() == q.device(), name,
        ": must be float32 [1, d]");
    return static_cast<const float*>(x.data_ptr());
  };
  STD_TORCH_CHECK(
      position.numel() == 1 && position.scalar_type() == ScalarType::Long && position.device() == q.device(),
      "position: must be int64 [1]");
  STD_TORCH_CHECK(q_norm.has_value() == k_norm.has_value(), "k_norm: goes with q_norm");
  Tensor y = torch::stable::new_empty(q, {B, H, d});
  const int64_t width = of_head ? d : H * d;
  DecodeAttentionArguments a = {};
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
  a.q_row = row_of(q, "q"), a.k_row = row_of(k, "k"), a.v_row = row_of(v, "v");
  a.q_norm = piece(q_norm, q, {width}, "q_norm"), a.k_norm = piece(k_norm, q, {width}, "k_norm");
  a.cos = table_of(cos, "cos"), a.sin = table_of(sin, "sin");
  a.position = static_cast<const int64_t*>(position.data_ptr());
  a.k_cache = cache_of(k_cache, "k_cache"), a.v_cache = cache_of(v_cache, "v_cache");
  a.cache_row = k_cache.stride(0);
  a.sinks = piece(sinks, q, {H}, "sinks"), a.y = y.data_ptr();
  a.B = static_cast<int>(B), a.H = static_cast<int>(H), a.N = static_cast<int>(N), a.d = static_cast<int>(d);
  a.window = static_cast<int>(std::min<int64_t>(window, N));
  a.eps = static_cast<float>(eps), a.clip = static_cast<float>(clip), a.scale = static_cast<float>(scale);
  if (q_norm.has_value()) a.norm = turn_first ? QueryNorm::kHeadTurned : of_head ? QueryNorm::kHead : QueryNorm::kAll;
  a.dtype = dtype_of(q.scalar_type(), "q");
  if (B > 0) check(decode_attention(a, device));
  return y;
}
#endif

// What follows is the same for both devices but for who computes.
using Run = void (*)(const RouteArguments&, const SortArguments*, const Tensor&);
using RunSinkhorn = void (*)(const RouteArguments&, SinkhornArguments&, const Tensor&);
using RunSort = void (*)(const int32_t*, SortArguments&, int, int64_t, const Tensor&);
using RunCombine = void (*)(const CombineArguments&, const Tensor&);
using RunExperts = void (*)(ExpertsArguments, const Tensor&, const Sorted&);

#define MOE_LAB_ROUTE_PARAMETERS                                                                                   \
  const Tensor &logits, std::optional<Tensor> gate_bias, std::optional<Tensor> bias, int64_t k, std::string score, \
      int64_t n_groups, int64_t top_groups, std::string group_score, bool renormalize, double scale
#define MOE_LAB_ROUTE_ARGUMENTS logits, gate_bias, bias, k, score, n_groups, top_groups, group_score, renormalize, scale

template <Run run>
void route_out(MOE_LAB_ROUTE_PARAMETERS, Tensor ids, Tensor weights) {
  run(arguments(MOE_LAB_ROUTE_ARGUMENTS, ids, weights), nullptr, logits);
}

template <Run run>
void route_and_sort_out(MOE_LAB_ROUTE_PARAMETERS, Tensor ids, Tensor weights, Tensor counts, Tensor offsets,
                        Tensor perm, Tensor inverse) {
  const RouteArguments a = arguments(MOE_LAB_ROUTE_ARGUMENTS, ids, weights);
  Outputs outputs{counts, offsets, perm, inverse};
  const SortArguments s = sort_arguments(a.E, a.T * a.k, logits, outputs);
  run(a, &s, logits);
}

template <Run run>
std::tuple<Tensor, Tensor> route(MOE_LAB_ROUTE_PARAMETERS) {
  Tensor ids = torch::stable::new_empty(logits, {logits.size(0), k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(logits, {logits.size(0), k}, ScalarType::Float);
  route_out<run>(MOE_LAB_ROUTE_ARGUMENTS, ids, weights);
  return {ids, weights};
}

template <Run run>
Six route_and_sort(MOE_LAB_ROUTE_PARAMETERS) {
  const int64_t T = logits.size(0), E = logits.size(1);
  Tensor ids = torch::stable::new_empty(logits, {T, k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(logits, {T, k}, ScalarType::Float);
  Tensor counts = new_int32(logits, E), offsets = new_int32(logits, E + 1);
  Tensor perm = new_int32(logits, T * k), inverse = new_int32(logits, T * k);
  route_and_sort_out<run>(MOE_LAB_ROUTE_ARGUMENTS, ids, weights, counts, offsets, perm, inverse);
  return {ids, weights, counts, offsets, perm, inverse};
}

template <RunSinkhorn run>
void sinkhorn_route_out(const Tensor& logits, int64_t k, int64_t iters, double temperature, double tolerance,
                        Tensor ids, Tensor weights, Tensor log_b) {
  const RouteArguments a = arguments(logits, {}, {}, k, "softmax", 1, 1, "max", true, 1.0, ids, weights);
  SinkhornArguments s = sinkhorn_arguments(a, logits, iters, temperature, tolerance, log_b);
  run(a, s, logits);
}

template <RunSinkhorn run>
std::tuple<Tensor, Tensor, Tensor> sinkhorn_route(const Tensor& logits, int64_t k, int64_t iters, double temperature,
                                                  double tolerance) {
  Tensor ids = torch::stable::new_empty(logits, {logits.size(0), k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(logits, {logits.size(0), k}, ScalarType::Float);
  Tensor log_b = torch::stable::new_empty(logits, {logits.size(1)}, ScalarType::Float);
  sinkhorn_route_out<run>(logits, k, iters, temperature, tolerance, ids, weights, log_b);
  return {ids, weights, log_b};
}

template <RunSort run>
void sort_out(const Tensor& ids, int64_t n_experts, Tensor counts, Tensor offsets, Tensor perm, Tensor inverse) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int && ids.is_contiguous() && ids.numel() < (int64_t{1} << 31),
                  "ids: must be int32, contiguous, with fewer than 2**31 elements");
  STD_TORCH_CHECK(1 <= n_experts && n_experts <= kMaxExperts, "n_experts=", n_experts, ": must be between 1 and ",
                  kMaxExperts);
  Outputs outputs{counts, offsets, perm, inverse};
  SortArguments s = sort_arguments(n_experts, ids.numel(), ids, outputs);
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

#define MOE_LAB_ROUTE_SCHEMA                                                                                           \
  "(Tensor logits, Tensor? gate_bias, Tensor? bias, int k, str score, int n_groups, int top_groups, str group_score, " \
  "bool renormalize, float scale"

#define MOE_LAB_EXPERTS_SCHEMA                                                                                        \
  "(Tensor x, Tensor ids, Tensor weights, Tensor w_gate_up, Tensor w_down, Tensor? gate_up_bias, Tensor? down_bias, " \
  "Tensor? offsets, Tensor? perm, Tensor? inverse, str activation, bool scales_input, int up_rows, int up_tokens, "   \
  "int down_rows, int down_tokens, int pieces"

}  // namespace
}  // namespace moe_lab

STABLE_TORCH_LIBRARY_FRAGMENT(moe_lab, m) {
  m.def("route" MOE_LAB_ROUTE_SCHEMA ") -> (Tensor ids, Tensor weights)");
  m.def("route.out" MOE_LAB_ROUTE_SCHEMA ", *, Tensor(a!) ids, Tensor(b!) weights) -> ()");
  m.def("route_and_sort" MOE_LAB_ROUTE_SCHEMA
        ") -> (Tensor ids, Tensor weights, Tensor counts, Tensor offsets, Tensor perm, Tensor inverse)");
  m.def("route_and_sort.out" MOE_LAB_ROUTE_SCHEMA
        ", *, Tensor(a!) ids, Tensor(b!) weights, Tensor(c!) counts, Tensor(d!) offsets, Tensor(e!) perm, "
        "Tensor(f!) inverse) -> ()");
  m.def("gate_route(Tensor x, Tensor gate, Tensor? gate_bias, Tensor? bias, int k, str score, int n_groups, "
        "int top_groups, str group_score, bool renormalize, float scale) -> (Tensor ids, Tensor weights)");
  m.def("norm_gate_route(Tensor x, Tensor residual, Tensor norm_weight, float eps, Tensor gate, Tensor? gate_bias, "
        "Tensor? bias, int k, str score, int n_groups, int top_groups, str group_score, bool renormalize, float scale) "
        "-> (Tensor normed, Tensor total, Tensor ids, Tensor weights)");
  m.def("sinkhorn_route(Tensor logits, int k, int iters, float temperature, float tolerance) "
        "-> (Tensor ids, Tensor weights, Tensor log_b)");
  m.def("sort(Tensor ids, int n_experts) -> (Tensor counts, Tensor offsets, Tensor perm, Tensor inverse)");
  m.def("sort.out(Tensor ids, int n_experts, *, Tensor(a!) counts, Tensor(b!) offsets, Tensor(c!) perm, "
        "Tensor(d!) inverse) -> ()");
  m.def("combine(Tensor o, Tensor? inverse, Tensor ids, Tensor? weights, ScalarType dtype) -> Tensor");
  m.def("combine.out(Tensor o, Tensor? inverse, Tensor ids, Tensor? weights, *, Tensor(a!) y) -> ()");
  m.def("experts" MOE_LAB_EXPERTS_SCHEMA ") -> Tensor");
  m.def("experts.out" MOE_LAB_EXPERTS_SCHEMA ", *, Tensor(a!) y) -> ()");
#ifdef MOE_LAB_HOPPER
  m.def("hopper_gemv(Tensor x, Tensor? residual, Tensor? norm, float eps, Tensor weight, Tensor? bias, "
        "Tensor(a!)? total) -> Tensor");
  m.def("hopper_attention(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, float clip, "
        "Tensor cos, Tensor sin, Tensor position, Tensor(a!) k_cache, Tensor(b!) v_cache, bool turn_first, int window, "
        "float scale, Tensor? sinks) -> Tensor");
#endif
  m.def("sinkhorn_route.out(Tensor logits, int k, int iters, float temperature, float tolerance, *, Tensor(a!) ids, "
        "Tensor(b!) weights, Tensor(c!) log_b) -> ()");
}

#define MOE_LAB_IMPLEMENT(m, half)                                                                      \
  m.impl("route", TORCH_BOX(&moe_lab::route<&moe_lab::run_##half>));                                    \
  m.impl("route.out", TORCH_BOX(&moe_lab::route_out<&moe_lab::run_##half>));                            \
  m.impl("route_and_sort", TORCH_BOX(&moe_lab::route_and_sort<&moe_lab::run_##half>));                  \
  m.impl("route_and_sort.out", TORCH_BOX(&moe_lab::route_and_sort_out<&moe_lab::run_##half>));          \
  m.impl("sinkhorn_route", TORCH_BOX(&moe_lab::sinkhorn_route<&moe_lab::run_sinkhorn_##half>));         \
  m.impl("sinkhorn_route.out", TORCH_BOX(&moe_lab::sinkhorn_route_out<&moe_lab::run_sinkhorn_##half>)); \
  m.impl("sort", TORCH_BOX(&moe_lab::sort<&moe_lab::run_sort_##half>));                                 \
  m.impl("sort.out", TORCH_BOX(&moe_lab::sort_out<&moe_lab::run_sort_##half>));                         \
  m.impl("combine", TORCH_BOX(&moe_lab::combine_op<&moe_lab::run_combine_##half>));                     \
  m.impl("combine.out", TORCH_BOX(&moe_lab::combine_op_out<&moe_lab::run_combine_##half>));             \
  m.impl("experts", TORCH_BOX(&moe_lab::experts_op<&moe_lab::run_experts_##half>));                     \
  m.impl("experts.out", TORCH_BOX(&moe_lab::experts_op_out<&moe_lab::run_experts_##half>))

STABLE_TORCH_LIBRARY_IMPL(moe_lab, CPU, m) { MOE_LAB_IMPLEMENT(m, cpu); }
#ifdef MOE_LAB_CUDA
STABLE_TORCH_LIBRARY_IMPL(moe_lab, CUDA, m) {
  MOE_LAB_IMPLEMENT(m, cuda);
  m.impl("gate_route", TORCH_BOX(&moe_lab::gate_route));
  m.impl("norm_gate_route", TORCH_BOX(&moe_lab::norm_gate_route));
#ifdef MOE_LAB_HOPPER
  m.impl("hopper_gemv", TORCH_BOX(&moe_lab::hopper_gemv));
  m.impl("hopper_attention", TORCH_BOX(&moe_lab::hopper_attention));
#endif
}
#endif
