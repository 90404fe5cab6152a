// The simulator of cache_policies.py, whose `reference` is the formula. Compiled by ops/cxx.py; called through ctypes.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

enum Policy { kLru, kLfu, kLfru, kBelady, kArc };

// What is known of each expert, and which of them are resident.
struct Cache {
  int capacity;
  int64_t now = 0;
  std::vector<uint8_t> resident;
  std::vector<int> members;  // those that are resident, in any order
  std::vector<int64_t> last, count, next;

  Cache(int n_experts, int capacity)
      : capacity(capacity), resident(n_experts), last(n_experts, -1), count(n_experts), next(n_experts) {}

  // Whether expert a is given up before b, where the policy says so; of two alike the one with the larger number.
  template <Policy policy>
  bool before(int a, int b) const {
    if (policy == kBelady && next[a] != next[b]) return next[a] > next[b];
    if (policy == kLfu && count[a] != count[b]) return count[a] < count[b];
    if (policy == kLfu && last[a] != last[b]) return last[a] < last[b];
    if (policy == kLfru) {  // count / age, without a division
      const int64_t left = count[a] * (now + 1 - last[b]), right = count[b] * (now + 1 - last[a]);
      if (left != right) return left < right;
    }
    return a > b;
  }

  template <Policy policy>
  void admit(int expert) {
    if (resident[expert]) return;
    int victim = expert;
    size_t place = members.size();
    if (static_cast<int>(members.size()) == capacity) {
      for (size_t i = 0; i < members.size(); i++)
        if (before<policy>(members[i], victim)) victim = members[i], place = i;
      if (victim == expert) return;  // it passes through
      resident[victim] = 0;
      members[place] = expert;
    } else {
      members.push_back(expert);
    }
    resident[expert] = 1;
  }
};

// ARC (Megiddo and Modha, FAST 2003, figure 4): the least recent of a list is the one with the smallest stamp.
struct Arc {
  enum List : uint8_t { kNone, kT1, kT2, kB1, kB2 };
  int c, p = 0;
  int64_t clock = 0;
  std::vector<uint8_t> list;
  std::vector<int64_t> stamp;
  int size[5] = {};

  Arc(int n_experts, int capacity) : c(capacity), list(n_experts), stamp(n_experts) {}

  bool resident(int expert) const { return list[expert] == kT1 || list[expert] == kT2; }

  void move(int expert, List to) {
    size[list[expert]]--, size[to]++;
    list[expert] = to;
    stamp[expert] = clock++;
  }

  int least_recent(List of) const {
    int found = -1;
    for (size_t e = 0; e < list.size(); e++)
      if (list[e] == of && (found < 0 || stamp[e] < stamp[found])) found = static_cast<int>(e);
    return found;
  }

  void replace(bool is_in_b2) {
    if (size[kT1] > 0 && (size[kT1] > p || (is_in_b2 && size[kT1] == p)))
      move(least_recent(kT1), kB1);
    else
      move(least_recent(kT2), kB2);
  }

  void use(int expert) {
    const uint8_t of = list[expert];
    if (resident(expert)) return move(expert, kT2);
    if (of == kB1) {
      p = std::min(c, p + std::max(size[kB2] / size[kB1], 1));
      replace(false);
      return move(expert, kT2);
    }
    if (of == kB2) {
      p = std::max(0, p - std::max(size[kB1] / size[kB2], 1));
      replace(true);
      return move(expert, kT2);
    }
    const int l1 = size[kT1] + size[kB1], total = l1 + size[kT2] + size[kB2];
    if (l1 == c) {
      if (size[kT1] < c) {
        move(least_recent(kB1), kNone);
        replace(false);
      } else {
        move(least_recent(kT1), kNone);
      }
    } else if (total >= c) {
      if (total == 2 * c) move(least_recent(kB2), kNone);
      replace(false);
    }
    move(expert, kT1);
  }
};

// Counts the misses and loads of one token; `resident` says what the cache holds before it.
template <class Resident>
void look(const int16_t* ids, const int16_t* guessed, int K, std::vector<int64_t>& guess, int64_t t, Resident resident,
          uint16_t* misses, uint16_t* loads) {
  int missed = 0, loaded = 0;
  for (int k = 0; guessed != nullptr && k < K; k++)
    if (guessed[k] >= 0 && !resident(guessed[k])) guess[guessed[k]] = t, loaded++;
  for (int k = 0; k < K; k++) missed += ids[k] >= 0 && !resident(ids[k]) && guess[ids[k]] != t;
  *misses = static_cast<uint16_t>(missed);
  *loads = static_cast<uint16_t>(missed + loaded);
}

// LRU for all capacities at once (Mattson et al. 1970): the cache of capacity C holds the first C of one list, the most
// recent first, of one token's experts those with the smaller number.
void run_lru(const int16_t* ids, const int16_t* guessed, int64_t T, int K, int E, const int* capacities, int n,
             uint16_t* misses, uint16_t* loads) {
  std::vector<int> order, place(E, E);  // place: in the list; E of what was never used
  std::vector<int64_t> guess(E, -1);
  std::vector<int16_t> needed;
  const int never = E;
  const auto is_held = [&](int expert, int capacity) { return place[expert] != never && place[expert] < capacity; };
  for (int64_t t = 0; t < T; t++, ids += K) {
    for (int c = 0; c < n; c++) {
      const auto resident = [&](int expert) { return is_held(expert, capacities[c]); };
      look(ids, guessed == nullptr ? nullptr : guessed + t * K, K, guess, t * n + c, resident, misses + c * T + t,
           loads + c * T + t);
    }
    needed.assign(ids, ids + K);
    std::sort(needed.begin(), needed.end(), [](int a, int b) { return a > b; });
    for (int expert : needed) {
      if (expert < 0) continue;
      if (place[expert] == never) {
        place[expert] = static_cast<int>(order.size());
        order.push_back(expert);
      }
      for (int i = place[expert]; i > 0; i--) place[order[i] = order[i - 1]] = i;
      place[order[0] = expert] = 0;
    }
  }
}

template <Policy policy>
void run(const int16_t* ids, const int16_t* guessed, const int64_t* next, int64_t T, int K, int E, int capacity,
         uint16_t* misses, uint16_t* loads) {
  Cache cache(E, capacity);
  std::vector<int64_t> guess(E, -1);
  if (policy == kBelady) {  // it begins with the experts that are needed first
    std::fill(cache.next.begin(), cache.next.end(), T);
    for (int64_t i = T * K - 1; i >= 0; i--)
      if (ids[i] >= 0) cache.next[ids[i]] = i / K;
    for (int expert = 0; expert < E; expert++) cache.template admit<policy>(expert);
  }
  for (int64_t t = 0; t < T; t++, ids += K) {
    look(
        ids, guessed == nullptr ? nullptr : guessed + t * K, K, guess, t, [&](int e) { return cache.resident[e]; },
        misses + t, loads + t);
    cache.now = t;
    for (int k = 0; k < K; k++) {
      if (ids[k] < 0) continue;
      cache.last[ids[k]] = t, cache.count[ids[k]]++;
      if (policy == kBelady) cache.next[ids[k]] = next[t * K + k];
    }
    for (int k = 0; k < K; k++)
      if (ids[k] >= 0) cache.template admit<policy>(ids[k]);
  }
}

void run_arc(const int16_t* ids, const int16_t* guessed, int64_t T, int K, int E, int capacity, uint16_t* misses,
             uint16_t* loads) {
  Arc arc(E, capacity);
  std::vector<int64_t> guess(E, -1);
  for (int64_t t = 0; t < T; t++, ids += K) {
    look(
        ids, guessed == nullptr ? nullptr : guessed + t * K, K, guess, t, [&](int e) { return arc.resident(e); },
        misses + t, loads + t);
    for (int k = 0; k < K; k++)
      if (ids[k] >= 0) arc.use(ids[k]);
  }
}

}  // namespace

// ids and guessed int16 [T, K] (guessed may be null), next int64 [T, K] (for Belady), misses and loads uint16 [n, T] of
// the n capacities.
extern "C" void simulate(int policy, const int16_t* ids, const int16_t* guessed, const int64_t* next, int64_t T, int K,
                         int E, const int* capacities, int n, uint16_t* misses, uint16_t* loads) {
  if (policy == kLru) return run_lru(ids, guessed, T, K, E, capacities, n, misses, loads);
  for (int c = 0; c < n; c++, misses += T, loads += T) {
    switch (policy) {
      case kLfu:
        run<kLfu>(ids, guessed, next, T, K, E, capacities[c], misses, loads);
        break;
      case kLfru:
        run<kLfru>(ids, guessed, next, T, K, E, capacities[c], misses, loads);
        break;
      case kBelady:
        run<kBelady>(ids, guessed, next, T, K, E, capacities[c], misses, loads);
        break;
      case kArc:
        run_arc(ids, guessed, T, K, E, capacities[c], misses, loads);
        break;
    }
  }
}
