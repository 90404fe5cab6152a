// The ops torch.ops.moe_lab.{route,route_and_sort,sinkhorn_route,gate_route,norm_gate_route}.
#include "decode.h"
#include "ops.h"

namespace moe_lab {
namespace {

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const float* bias_of(const std::optional<Tensor>& bias, const Tensor& logits, const char* name) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == logits.size(1) && bias->scalar_type() == ScalarType::Float &&
                      bias->is_contiguous() && bias->device() == logits.device(),
                  name, ": must be float32 [E], contiguous, on the device of the input");
  return static_cast<const float*>(bias->data_ptr());
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

void run_cpu(const RouteArguments& a, const SortArguments* s, const Tensor&) {
  route_cpu(a);
  if (s != nullptr) sort_cpu(a.ids, *s, a.E, a.T * a.k);
}

void run_sinkhorn_cpu(const RouteArguments& a, SinkhornArguments& s, const Tensor&) { sinkhorn_cpu(a, s); }

#ifdef MOE_LAB_CUDA
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

// What follows is the same for both devices but for who computes.
using Run = void (*)(const RouteArguments&, const SortArguments*, const Tensor&);
using RunSinkhorn = void (*)(const RouteArguments&, SinkhornArguments&, const Tensor&);

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
  const SortArguments s = sort_arguments(a.E, a.T * a.k, logits, counts, offsets, perm, inverse);
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

#define MOE_LAB_ROUTE_SCHEMA                                                                                           \
  "(Tensor logits, Tensor? gate_bias, Tensor? bias, int k, str score, int n_groups, int top_groups, str group_score, " \
  "bool renormalize, float scale"

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
  m.def("sinkhorn_route(Tensor logits, int k, int iters, float temperature, float tolerance) "
        "-> (Tensor ids, Tensor weights, Tensor log_b)");
  m.def("sinkhorn_route.out(Tensor logits, int k, int iters, float temperature, float tolerance, *, Tensor(a!) ids, "
        "Tensor(b!) weights, Tensor(c!) log_b) -> ()");
  m.def("gate_route(Tensor x, Tensor gate, Tensor? gate_bias, Tensor? bias, int k, str score, int n_groups, "
        "int top_groups, str group_score, bool renormalize, float scale) -> (Tensor ids, Tensor weights)");
  m.def("norm_gate_route(Tensor x, Tensor residual, Tensor norm_weight, float eps, Tensor gate, Tensor? gate_bias, "
        "Tensor? bias, int k, str score, int n_groups, int top_groups, str group_score, bool renormalize, float scale) "
        "-> (Tensor normed, Tensor total, Tensor ids, Tensor weights)");
}

#define MOE_LAB_IMPLEMENT(m, half)                                                              \
  m.impl("route", TORCH_BOX(&moe_lab::route<&moe_lab::run_##half>));                            \
  m.impl("route.out", TORCH_BOX(&moe_lab::route_out<&moe_lab::run_##half>));                    \
  m.impl("route_and_sort", TORCH_BOX(&moe_lab::route_and_sort<&moe_lab::run_##half>));          \
  m.impl("route_and_sort.out", TORCH_BOX(&moe_lab::route_and_sort_out<&moe_lab::run_##half>));  \
  m.impl("sinkhorn_route", TORCH_BOX(&moe_lab::sinkhorn_route<&moe_lab::run_sinkhorn_##half>)); \
  m.impl("sinkhorn_route.out", TORCH_BOX(&moe_lab::sinkhorn_route_out<&moe_lab::run_sinkhorn_##half>))

STABLE_TORCH_LIBRARY_IMPL(moe_lab, CPU, m) { MOE_LAB_IMPLEMENT(m, cpu); }
#ifdef MOE_LAB_CUDA
STABLE_TORCH_LIBRARY_IMPL(moe_lab, CUDA, m) {
  MOE_LAB_IMPLEMENT(m, cuda);
  m.impl("gate_route", TORCH_BOX(&moe_lab::gate_route));
  m.impl("norm_gate_route", TORCH_BOX(&moe_lab::norm_gate_route));
}
#endif
