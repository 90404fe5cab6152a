// The ops torch.ops.moe_lab.{hopper_gemv,hopper_attention}.
#ifdef MOE_LAB_HOPPER
#include "decode.h"

#include <algorithm>
#include <initializer_list>

#include "ops.h"

namespace moe_lab {
namespace {

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
  STD_TORCH_CHECK(k_cache.dim() == 4 && q.dim() == 2, "q: must be [B, H d], and the caches [B, H/G, N, d]");
  const int64_t B = k_cache.size(0), key_heads = k_cache.size(1), N = k_cache.size(2), d = k_cache.size(3);
  STD_TORCH_CHECK(d == 64 || d == 128, "k_cache: d must be 64 or 128");
  const int64_t H = q.size(1) / d, G = key_heads > 0 ? H / key_heads : 0;
  STD_TORCH_CHECK(G >= 1 && G <= kMostQueries && H == G * key_heads, "q: must have 1 to ", kMostQueries,
                  " heads for each of the cache");
  const bool of_head = q_norm.has_value() && q_norm->size(0) == d && H > 1;
  const auto row_of = [&](const Tensor& x, int64_t heads, const char* name) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == B && x.size(1) == heads * d && x.stride(1) == 1 &&
                        x.stride(0) % 8 == 0 && x.scalar_type() == q.scalar_type() && x.device() == q.device() &&
                        reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
                    name, ": must be [B, heads * d] of 16 bits, with rows on boundaries of 16 bytes");
    return x.stride(0);
  };
  const auto cache_of = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == B && x.size(1) == key_heads && x.size(2) == N && x.size(3) == d &&
                        x.stride(3) == 1 && x.stride(2) == d && x.stride(1) == N * d &&
                        x.stride(0) == k_cache.stride(0) && (B < 2 || x.stride(0) % 8 == 0) &&
                        x.scalar_type() == q.scalar_type() && x.device() == q.device() &&
                        reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
                    name, ": must be [B, H/G, N, d] of q's dtype, the positions of a head together");
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
  STD_TORCH_CHECK(!turn_first || !q_norm.has_value() || q_norm->size(0) == d,
                  "turn_first: goes with norms of each head");
  Tensor y = torch::stable::new_empty(q, {B, H, d});
  DecodeAttentionArguments a = {};
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
  a.q_row = row_of(q, H, "q"), a.k_row = row_of(k, key_heads, "k"), a.v_row = row_of(v, key_heads, "v");
  a.q_norm = piece(q_norm, q, {of_head ? d : H * d}, "q_norm");
  a.k_norm = piece(k_norm, q, {of_head ? d : key_heads * d}, "k_norm");
  a.cos = table_of(cos, "cos"), a.sin = table_of(sin, "sin");
  a.position = static_cast<const int64_t*>(position.data_ptr());
  a.k_cache = cache_of(k_cache, "k_cache"), a.v_cache = cache_of(v_cache, "v_cache");
  a.cache_row = k_cache.stride(0);
  a.sinks = piece(sinks, q, {H}, "sinks"), a.y = y.data_ptr();
  a.B = static_cast<int>(B), a.H = static_cast<int>(H), a.G = static_cast<int>(G), a.N = static_cast<int>(N),
  a.d = static_cast<int>(d);
  a.window = static_cast<int>(std::min<int64_t>(window, N));
  a.eps = static_cast<float>(eps), a.clip = static_cast<float>(clip), a.scale = static_cast<float>(scale);
  if (q_norm.has_value()) a.norm = turn_first ? QueryNorm::kHeadTurned : of_head ? QueryNorm::kHead : QueryNorm::kAll;
  a.dtype = dtype_of(q.scalar_type(), "q");
  if (B > 0) check(G == 1 ? decode_attention(a, device) : decode_attention_grouped(a, device));
  return y;
}

}  // namespace
}  // namespace moe_lab

STABLE_TORCH_LIBRARY_FRAGMENT(moe_lab, m) {
  m.def("hopper_gemv(Tensor x, Tensor? residual, Tensor? norm, float eps, Tensor weight, Tensor? bias, "
        "Tensor(a!)? total) -> Tensor");
  m.def("hopper_attention(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, float clip, "
        "Tensor cos, Tensor sin, Tensor position, Tensor(a!) k_cache, Tensor(b!) v_cache, bool turn_first, int window, "
        "float scale, Tensor? sinks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(moe_lab, CUDA, m) {
  m.impl("hopper_gemv", TORCH_BOX(&moe_lab::hopper_gemv));
  m.impl("hopper_attention", TORCH_BOX(&moe_lab::hopper_attention));
}
#endif
