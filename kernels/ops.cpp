#include "ops.h"

#ifdef MOE_LAB_CUDA
#include <mutex>
#include <vector>

#include <dlfcn.h>
#endif

namespace moe_lab {

Dtype dtype_of(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name,
                  ": must be float32, float16 or bfloat16");
  return dtype == ScalarType::Float ? Dtype::kFloat32 : dtype == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

void check_output(const Tensor& output, const Tensor& input, ScalarType dtype, int64_t elements, const char* name) {
  STD_TORCH_CHECK(output.scalar_type() == dtype && output.numel() == elements && output.is_contiguous() &&
                      output.device() == input.device(),
                  name, ": must be contiguous, on the device of the input, ",
                  dtype == ScalarType::Int ? "int32" : "float32", ", with ", elements, " elements");
}

Tensor new_int32(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Int); }

SortArguments sort_arguments(int64_t E, int64_t slots, const Tensor& like, Tensor& counts, Tensor& offsets,
                             Tensor& perm, Tensor& inverse) {
  check_output(counts, like, ScalarType::Int, E, "counts");
  check_output(offsets, like, ScalarType::Int, E + 1, "offsets");
  check_output(perm, like, ScalarType::Int, slots, "perm");
  check_output(inverse, like, ScalarType::Int, slots, "inverse");
  auto data = [](Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  return {data(counts), data(offsets), data(perm), data(inverse), nullptr};
}

#ifdef MOE_LAB_CUDA
void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "moe_lab: CUDA: ", cudaGetErrorString(error)); }

namespace {

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

}  // namespace

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
#endif

}  // namespace moe_lab
