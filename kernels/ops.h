// What the files of ops have in common: torch's types, and what they ask of tensors and devices.
//
// The ops are on torch's stable ABI: one binary for several versions of torch. Without MOE_LAB_CUDA only their C++ half
// is compiled. All outputs are made or given by the caller, nothing is read on the host, and all work is put on the
// current stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

#include "route.h"
#ifdef MOE_LAB_CUDA
#include "cuda.h"
#endif

namespace moe_lab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Dtype dtype_of(ScalarType dtype, const char* name);
void check_output(const Tensor& output, const Tensor& input, ScalarType dtype, int64_t elements, const char* name);
Tensor new_int32(const Tensor& like, int64_t size);

SortArguments sort_arguments(int64_t E, int64_t slots, const Tensor& like, Tensor& counts, Tensor& offsets,
                             Tensor& perm, Tensor& inverse);
#ifdef MOE_LAB_CUDA
void check(cudaError_t error);
// With torch's current stream there.
Device device_of(int index);
#endif

}  // namespace moe_lab
