// What the ops ask of the CUDA half of the extension, and how its kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "combine.h"
#include "decode.h"
#include "experts.h"
#include "route.h"

namespace moe_lab {

struct Device {
  cudaStream_t stream;
  int multiprocessors;
  bool is_hopper;        // or newer: clusters, and launches that begin while the kernel before ends
  bool is_sm_90;         // 9.0 and no other: the instructions of sm_90a
  int cluster;           // blocks of one, at most
  int64_t shared_bytes;  // that a block may have
  int64_t l2_bytes;      // of the cache of all multiprocessors
};

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;
  bool cooperative = false;  // the blocks wait for each other, so all must run at once
  bool apart = false;        // no two of its blocks share a multiprocessor, for want of shared memory
};

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, const Device& device, Parameters... parameters) {
  size_t shared_bytes = how.shared_bytes;
  if (how.apart) shared_bytes = std::max(shared_bytes, static_cast<size_t>(device.shared_bytes / 2 + 1));
  if (shared_bytes > 48 * 1024) {  // as much as there is: another thread may be about to launch with more than this
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(device.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = device.stream;
  config.attrs = attributes;
  if (how.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (device.is_hopper) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    if (how.cluster > 1) {
      if (how.cluster > 8) {
        const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (error != cudaSuccess) return error;
      }
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
    }
  }
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// With `s` the slots are sorted too. By scores: where they are ranked or groups limited. T is not 0.
cudaError_t route_by_logits(const RouteArguments& a, const SortArguments* s, const Device& device);
cudaError_t route_by_scores(const RouteArguments& a, const SortArguments* s, const Device& device);
// Rows of `SortArguments::block_counts`.
int64_t sort_blocks(int64_t slots, const Device& device);
// With `unused` an id outside [0, E) is an unused slot; else there is none.
cudaError_t sort_slots(const int32_t* ids, const SortArguments& s, int E, int64_t slots, const Device& device,
                       bool unused = false);
cudaError_t combine(const CombineArguments& a, const Device& device);
// On compute capability 9.0, where MOE_LAB_HOPPER is defined; T is not 0.
cudaError_t experts(const ExpertsArguments& a, const Device& device);
// As `experts`; of one row, and of more. K is a multiple of 8, and x is within the limits of decode.h.
cudaError_t gemv(const GemvArguments& a, const Device& device);
cudaError_t gemv_of_rows(const GemvArguments& a, const Device& device);
// As `experts`; d is 64 or 128, and G is 1 or, of the second, at most `kMostQueries`.
cudaError_t decode_attention(const DecodeAttentionArguments& a, const Device& device);
cudaError_t decode_attention_grouped(const DecodeAttentionArguments& a, const Device& device);
// Few tokens or few experts, T not 0; the logits of `a` may be written.
bool can_route_by_gate(const RouteArguments& a, const GateArguments& g, const Device& device);
cudaError_t route_by_gate(const RouteArguments& a, const GateArguments& g, const Device& device);
// Of these: few experts, any number of tokens.
cudaError_t route_by_small_gate(RouteArguments a, const GateArguments& g, const Device& device);
// At most `kMostRows` tokens, not 0.
bool can_norm_and_route(const RouteArguments& a, const NormGateArguments& g, const Device& device);
cudaError_t norm_and_route(RouteArguments a, const NormGateArguments& g, const Device& device);
// One block, or several that run at once and need that many floats of `SinkhornArguments::partials`.
struct SinkhornGrid {
  int64_t blocks, partials;
};
SinkhornGrid sinkhorn_grid(const RouteArguments& a, const Device& device);
cudaError_t sinkhorn(const RouteArguments& a, const SinkhornArguments& s, const Device& device);

}  // namespace moe_lab
