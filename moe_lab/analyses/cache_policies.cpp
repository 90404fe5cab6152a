// The simulator of cache_policies.py, whose `reference` is the formula. Compiled by ops/cxx.py; called through ctypes.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

enum Policy { kLru, kLeastStale, kLfu, kLfru, kBelady, kArc };

// The trace, and where the misses and loads of a row are added up. Row t is of layer t % n_layers.
struct Rows {
  const int16_t *ids, *guessed;  // [T, K], guessed may be null
  const int32_t *unit, *layer;   // of each row; of each expert
  int64_t T;
  int K, E, n_layers;
};

// Lists of experts, the most recently used first. An expert is in one of them or in none.
struct Lists {
  int n_experts;
  std::vector<int> older, newer;  // rings; the ends of list i meet in n_experts + i
  std::vector<int> list, size;    // list: of each expert, -1 for none

  Lists(int n_experts, int n_lists)
      : n_experts(n_experts), older(n_experts + n_lists), newer(older.size()), list(n_experts, -1), size(n_lists) {
    for (size_t i = 0; i < older.size(); i++) older[i] = newer[i] = static_cast<int>(i);
  }

  void remove(int expert) {
    older[newer[expert]] = older[expert], newer[older[expert]] = newer[expert];
    size[list[expert]]--;
    list[expert] = -1;
  }

  void push(int expert, int to) {  // from wherever it is
    if (list[expert] >= 0) remove(expert);
    const int end = n_experts + to, first = older[end];
    older[end] = newer[first] = expert;
    older[expert] = first, newer[expert] = end;
    list[expert] = to;
    size[to]++;
  }

  int oldest(int of) const { return size[of] ? newer[n_experts + of] : -1; }
};

// What is known of each expert, and which of them are resident.
struct Cache {
  int capacity, n_leaves = 1;
  bool has_tournament;
  int64_t now = 0;
  std::vector<int> members, place;  // those that are resident in any order; where they stand, -1 elsewhere
  std::vector<int> winner;          // a tournament: of each node the expert below it that is given up first, or -1
  std::vector<int64_t> last, count, next;

  // The order under LFRU changes with time, so it has no tournament; among few experts a search is faster.
  Cache(Policy policy, int n_experts, int capacity)
      : capacity(capacity), has_tournament(policy != kLfru && n_experts > 256), place(n_experts, -1),
        last(n_experts, -1), count(n_experts), next(n_experts) {
    while (n_leaves < n_experts) n_leaves *= 2;
    winner.assign(2 * n_leaves, -1);
  }

  bool resident(int expert) const { return place[expert] >= 0; }

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

  // Plays the matches of an expert again.
  template <Policy policy>
  void changed(int expert) {
    if (!has_tournament) return;
    int node = n_leaves + expert;
    winner[node] = resident(expert) ? expert : -1;
    while (node /= 2) {
      const int a = winner[2 * node], b = winner[2 * node + 1];
      const int won = a < 0 ? b : b < 0 ? a : before<policy>(a, b) ? a : b;
      if (won == winner[node] && won != expert) return;
      winner[node] = won;
    }
  }

  template <Policy policy>
  int first() const {
    if (has_tournament) return winner[1];
    int found = members[0];
    for (int member : members)
      if (before<policy>(member, found)) found = member;
    return found;
  }

  template <Policy policy>
  void admit(int expert) {
    if (resident(expert)) return;
    if (static_cast<int>(members.size()) < capacity) {
      place[expert] = static_cast<int>(members.size());
      members.push_back(expert);
    } else {
      const int victim = first<policy>();
      if (before<policy>(expert, victim)) return;  // it passes through
      members[place[expert] = place[victim]] = expert;
      place[victim] = -1;
      changed<policy>(victim);
    }
    changed<policy>(expert);
  }
};

// ARC (Megiddo and Modha, FAST 2003, figure 4).
struct Arc {
  enum List { kT1, kT2, kB1, kB2 };
  int c, p = 0;
  Lists lists;
  std::vector<int>& size = lists.size;

  Arc(int n_experts, int capacity) : c(capacity), lists(n_experts, 4) {}

  bool resident(int expert) const { return lists.list[expert] == kT1 || lists.list[expert] == kT2; }

  void replace(bool is_in_b2) {
    if (size[kT1] > 0 && (size[kT1] > p || (is_in_b2 && size[kT1] == p)))
      lists.push(lists.oldest(kT1), kB1);
    else
      lists.push(lists.oldest(kT2), kB2);
  }

  void use(int expert) {
    const int of = lists.list[expert];
    if (resident(expert)) return lists.push(expert, kT2);
    if (of == kB1) {
      p = std::min(c, p + std::max(size[kB2] / size[kB1], 1));
      replace(false);
      return lists.push(expert, kT2);
    }
    if (of == kB2) {
      p = std::max(0, p - std::max(size[kB1] / size[kB2], 1));
      replace(true);
      return lists.push(expert, kT2);
    }
    const int l1 = size[kT1] + size[kB1], total = l1 + size[kT2] + size[kB2];
    if (l1 == c) {
      if (size[kT1] < c) {
        lists.remove(lists.oldest(kB1));
        replace(false);
      } else {
        lists.remove(lists.oldest(kT1));
      }
    } else if (total >= c) {
      if (total == 2 * c) lists.remove(lists.oldest(kB2));
      replace(false);
    }
    lists.push(expert, kT1);
  }
};

// Counts the misses and loads of each row; `resident` says what the cache holds before it.
struct Counter {
  const Rows& rows;
  int64_t *misses, *loads;  // of each unit
  std::vector<int64_t> guess = std::vector<int64_t>(rows.E, -1);

  template <class Resident>
  void look(int64_t t, Resident resident) {
    const int16_t* ids = rows.ids + t * rows.K;
    int missed = 0, loaded = 0;
    if (rows.guessed != nullptr)
      for (const int16_t *e = rows.guessed + t * rows.K, *end = e + rows.K; e < end; e++)
        if (*e >= 0 && !resident(*e)) guess[*e] = t, loaded++;
    for (int k = 0; k < rows.K; k++) missed += ids[k] >= 0 && !resident(ids[k]) && guess[ids[k]] != t;
    misses[rows.unit[t]] += missed;
    loads[rows.unit[t]] += missed + loaded;
  }
};

// Least-stale, with a list for each layer; with one layer it is LRU, of one token's experts those with the smaller
// number first.
void run_lists(const Rows& rows, int capacity, Counter counter) {
  Lists lists(rows.E, rows.n_layers);
  std::vector<int64_t> last(rows.E, -1);  // the pass
  std::vector<int16_t> needed;
  int held = 0;
  for (int64_t t = 0; t < rows.T; t++) {
    counter.look(t, [&](int e) { return lists.list[e] >= 0; });
    const int64_t pass = t / rows.n_layers;
    const int here = static_cast<int>(t % rows.n_layers);
    needed.assign(rows.ids + t * rows.K, rows.ids + (t + 1) * rows.K);
    std::sort(needed.begin(), needed.end(), [](int a, int b) { return a > b; });
    for (int expert : needed) {
      if (expert < 0) continue;
      held += lists.list[expert] < 0;
      lists.push(expert, rows.layer[expert]);
      last[expert] = pass;
    }
    for (; held > capacity; held--) {
      int victim = -1;
      for (int i = 0; victim < 0 && i < rows.n_layers; i++) {  // the layer that comes again last first
        const int layer = (here - i + rows.n_layers) % rows.n_layers;
        if (lists.size[layer] && last[lists.oldest(layer)] < pass) victim = lists.oldest(layer);
      }
      for (int layer = here; victim < 0; layer--) victim = lists.oldest(layer);  // none is stale
      lists.remove(victim);
    }
  }
}

// For each slot the next row that needs its expert, T for none; `first` gets the first of each expert.
std::vector<int32_t> next_uses(const Rows& rows, std::vector<int64_t>& first) {
  std::vector<int32_t> next(rows.T * rows.K);
  std::fill(first.begin(), first.end(), rows.T);
  for (int64_t i = rows.T * rows.K - 1; i >= 0; i--) {
    if (rows.ids[i] < 0) continue;
    next[i] = static_cast<int32_t>(first[rows.ids[i]]);
    first[rows.ids[i]] = i / rows.K;
  }
  return next;
}

template <Policy policy>
void run(const Rows& rows, int capacity, Counter counter, const std::vector<int32_t>& next,
         const std::vector<int64_t>& first) {
  Cache cache(policy, rows.E, capacity);
  if (policy == kBelady) {  // it begins with the experts that are needed first
    cache.next = first;
    for (int expert = 0; expert < rows.E; expert++) cache.template admit<policy>(expert);
  }
  for (int64_t t = 0; t < rows.T; t++) {
    const int16_t* ids = rows.ids + t * rows.K;
    counter.look(t, [&](int e) { return cache.resident(e); });
    cache.now = t;
    for (int k = 0; k < rows.K; k++) {
      if (ids[k] < 0) continue;
      cache.last[ids[k]] = t, cache.count[ids[k]]++;
      if (policy == kBelady) cache.next[ids[k]] = next[t * rows.K + k];
      if (cache.resident(ids[k])) cache.template changed<policy>(ids[k]);
    }
    for (int k = 0; k < rows.K; k++)
      if (ids[k] >= 0) cache.template admit<policy>(ids[k]);
  }
}

void run_arc(const Rows& rows, int capacity, Counter counter) {
  Arc arc(rows.E, capacity);
  for (int64_t t = 0; t < rows.T; t++) {
    counter.look(t, [&](int e) { return arc.resident(e); });
    for (int k = 0; k < rows.K; k++)
      if (rows.ids[t * rows.K + k] >= 0) arc.use(rows.ids[t * rows.K + k]);
  }
}

}  // namespace

// ids and guessed int16 [T, K] (guessed may be null), unit int32 [T], layer int32 [E]; misses and loads int64 [n, U],
// zeros, of the n capacities and U units.
extern "C" void simulate(int policy, const int16_t* ids, const int16_t* guessed, const int32_t* unit,
                         const int32_t* layer, int64_t T, int K, int E, int n_layers, const int* capacities, int n,
                         int64_t U, int64_t* misses, int64_t* loads) {
  Rows rows{ids, guessed, unit, layer, T, K, E, n_layers};
  std::vector<int32_t> one_layer(E), next;
  if (policy == kLru) rows.layer = one_layer.data(), rows.n_layers = 1;
  std::vector<int64_t> first(E);
  if (policy == kBelady) next = next_uses(rows, first);
  for (int c = 0; c < n; c++) {
    const Counter counter{rows, misses + c * U, loads + c * U};
    switch (policy) {
      case kLru:
      case kLeastStale:
        run_lists(rows, capacities[c], counter);
        break;
      case kLfu:
        run<kLfu>(rows, capacities[c], counter, next, first);
        break;
      case kLfru:
        run<kLfru>(rows, capacities[c], counter, next, first);
        break;
      case kBelady:
        run<kBelady>(rows, capacities[c], counter, next, first);
        break;
      case kArc:
        run_arc(rows, capacities[c], counter);
        break;
    }
  }
}
