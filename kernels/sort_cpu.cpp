// Slots sorted by expert on a CPU.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "route.h"

namespace moe_lab {

// By counting, in parts whose order is that of the slots; the unused ones as those of one more expert.
void sort_cpu(const int32_t* ids, const SortArguments& s, int E, int64_t slots) {
  const int64_t parts = std::clamp<int64_t>(slots / 16384, 1, torch::stable::get_num_threads());
  const int64_t each = (slots + parts - 1) / parts;
  std::vector<int32_t> counts(parts * (E + 1), 0);
  auto count_of = [&](int64_t part, int64_t slot) -> int32_t& {
    return counts[part * (E + 1) + std::min(static_cast<uint32_t>(ids[slot]), static_cast<uint32_t>(E))];
  };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t slot = part * each; slot < std::min((part + 1) * each, slots); ++slot) ++count_of(part, slot);
    }
  });
  int32_t before = 0;
  for (int e = 0; e <= E; ++e) {
    s.offsets[e] = before;
    for (int64_t part = 0; part < parts; ++part) {
      int32_t& count = counts[part * (E + 1) + e];
      const int32_t its = count;
      count = before;  // from now on the next free position
      before += its;
    }
    if (e < E) s.counts[e] = before - s.offsets[e];
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t slot = part * each; slot < std::min((part + 1) * each, slots); ++slot) {
        const int32_t position = count_of(part, slot)++;
        s.perm[position] = static_cast<int32_t>(slot);
        s.inverse[slot] = position;
      }
    }
  });
}

}  // namespace moe_lab
