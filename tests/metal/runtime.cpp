// One fibre per GPU thread, on one core. A fibre runs until it meets a simdgroup operation or a
// barrier; which runs next is the schedule. All that a kernel can see of other threads goes through
// here, so a launch with the same seed is the same launch.
//
// Never compiled with a sanitizer itself: what lanes exchange here is no access of theirs. What the
// sanitizers have to be told is told by hand, below.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

#include "fibre.h"
#include "launch.h"

namespace emulator {
namespace {

constexpr size_t STACK = 256 * 1024;  // reserved; a lane touches a page or two of it
constexpr size_t STACK_GUARD = 64 * 1024;
constexpr uint32_t LANES = 32, MAX_THREADS = 1024, THREADGROUP_BYTES = 32768;
constexpr size_t LARGEST_VALUE = 16;

enum State { READY, AT_EXCHANGE, AT_SIMDGROUP_BARRIER, AT_THREADGROUP_BARRIER, DONE };

struct Fibre {
  Ids ids;
  State state;
  int site;
  uint32_t exchanges, barriers[2];
  void* stack_pointer;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* asan = nullptr;
};

// Two of what lanes leave for one another: a lane that is ahead may leave its next value, or reach
// its next barrier, while another has yet to take up the last one.
struct Simdgroup {
  alignas(LARGEST_VALUE) char values[2][LANES * LARGEST_VALUE];
  uint32_t active, ready;
  uint64_t barrier[2];  // for TSan, which tells sync objects apart by their 8 bytes
};

struct Run {
  const Kernel* kernel;
  const Launch* launch;
  void** buffers;
  std::vector<Fibre> fibres;
  std::vector<Simdgroup> simdgroups;
  uint32_t threads;
  Fibre* current = nullptr;
  void* stack_pointer;
  void* tsan;
  void* asan;
  const void* stack_bottom;
  size_t stack_size;
  uint64_t barrier[2], start, finish;
  uint64_t random;
} run;

uint32_t below(uint32_t n) {  // splitmix64
  uint64_t z = (run.random += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return uint32_t((z ^ (z >> 31)) % n);
}

void order(std::vector<uint32_t>& what) {
  if (run.launch->schedule == REVERSED) std::reverse(what.begin(), what.end());
  if (run.launch->schedule != RANDOM) return;
  for (size_t i = what.size(); i > 1; i--) std::swap(what[i - 1], what[below(uint32_t(i))]);
}

// Not memcpy and memset: TSan would take those for accesses of the lane.
void copy(char* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; i++) ((volatile char*)to)[i] = ((const volatile char*)from)[i];
}

bool failed(const char* what, const Fibre& where) {
  char text[192];
  snprintf(text, sizeof text, "%s, at line %d", what, where.site);
  report(text, &where.ids);
  return false;
}

void leave(Fibre& me, State state) {
  me.state = state;
  __tsan_switch_to_fiber(run.tsan, 1);
  __sanitizer_start_switch_fiber(state == DONE ? nullptr : &me.asan, run.stack_bottom,
                                 run.stack_size);
  emulator_switch(&me.stack_pointer, &run.stack_pointer);
  __sanitizer_finish_switch_fiber(me.asan, &run.stack_bottom, &run.stack_size);
}

void enter(Fibre& fibre) {
  run.current = &fibre;
  __tsan_switch_to_fiber(fibre.tsan, 1);
  __sanitizer_start_switch_fiber(&run.asan, fibre.stack, STACK);
  emulator_switch(&run.stack_pointer, &fibre.stack_pointer);
  __sanitizer_finish_switch_fiber(run.asan, nullptr, nullptr);
  run.current = nullptr;
}

void body() {
  __sanitizer_finish_switch_fiber(nullptr, &run.stack_bottom, &run.stack_size);
  Fibre& me = *run.current;
  __tsan_acquire(&run.start);
  run.kernel->thread(&me.ids, run.buffers);
  __tsan_release(&run.finish);  // not `start`: a thread that starts late must not inherit it
  leave(me, DONE);
}

const void* exchange(const void* value, size_t size, int site, uint32_t* active) {
  Fibre& me = *run.current;
  Simdgroup& group = run.simdgroups[me.ids.simdgroup_index_in_threadgroup];
  char* values = group.values[me.exchanges++ & 1];
  copy(values + me.ids.thread_index_in_simdgroup * size, value, size);
  me.site = site;
  leave(me, AT_EXCHANGE);
  *active = group.active;
  return values;
}

void barrier(int whole, int orders_memory, int site) {
  Fibre& me = *run.current;
  Simdgroup& group = run.simdgroups[me.ids.simdgroup_index_in_threadgroup];
  uint64_t* cell = &(whole ? run.barrier : group.barrier)[me.barriers[whole]++ & 1];
  if (orders_memory) __tsan_release(cell);
  me.site = site;
  leave(me, whole ? AT_THREADGROUP_BARRIER : AT_SIMDGROUP_BARRIER);
  if (orders_memory) __tsan_acquire(cell);
}

uint32_t lane() { return run.current->ids.thread_index_in_simdgroup; }

void prepare(Fibre& fibre, uint32_t index, const uint32_t group[3], const uint32_t groups[3],
             const uint32_t asked[3], const uint32_t size[3]) {
  Ids& ids = fibre.ids;
  const uint32_t position[3] = {index % size[0], index / size[0] % size[1],
                                index / size[0] / size[1]};
  for (int i = 0; i < 3; i++) {
    ids.thread_position_in_threadgroup[i] = position[i];
    ids.thread_position_in_grid[i] = group[i] * asked[i] + position[i];
    ids.threadgroup_position_in_grid[i] = group[i];
    ids.threadgroups_per_grid[i] = groups[i];
    ids.threads_per_grid[i] = run.launch->grid[i];
    ids.threads_per_threadgroup[i] = size[i];
    ids.dispatch_threads_per_threadgroup[i] = asked[i];
  }
  ids.thread_index_in_threadgroup = index;
  ids.thread_index_in_simdgroup = index % LANES;
  ids.simdgroup_index_in_threadgroup = index / LANES;
  ids.simdgroups_per_threadgroup = uint32_t(run.simdgroups.size());
  fibre.state = READY;
  fibre.site = 0;
  fibre.exchanges = fibre.barriers[0] = fibre.barriers[1] = 0;
  if (!fibre.stack) {
    char* memory = (char*)mmap(nullptr, STACK_GUARD + STACK, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(memory, STACK_GUARD, PROT_NONE);
    fibre.stack = memory + STACK_GUARD;
    fibre.tsan = __tsan_create_fiber(0);
  }
  __asan_unpoison_memory_region(fibre.stack, STACK);
  void** top = (void**)(fibre.stack + STACK) - FRAME;
  for (int i = 0; i < FRAME; i++) top[i] = nullptr;
  top[RETURN] = (void*)body;
  fibre.stack_pointer = top;
}

// Lets the lanes of a simdgroup go on that have all come to the same simdgroup operation.
bool release_simdgroup(uint32_t index) {
  const uint32_t begin = index * LANES, end = std::min(begin + LANES, run.threads);
  Fibre* first = nullptr;
  Fibre* elsewhere = nullptr;
  bool returned = false;
  for (uint32_t i = begin; i < end; i++) {
    Fibre& fibre = run.fibres[i];
    if (fibre.state == AT_THREADGROUP_BARRIER) elsewhere = &fibre;
    else if (fibre.state == DONE) returned = true;
    else if (!first) first = &fibre;
    else if (fibre.state != first->state || fibre.site != first->site ||
             fibre.exchanges != first->exchanges || fibre.barriers[0] != first->barriers[0])
      return failed("lanes of one simdgroup are at different simdgroup operations", fibre);
  }
  if (!first) return true;
  if (elsewhere)
    return failed("lanes of one simdgroup are at a simdgroup operation, others at a barrier", *first);
  if (returned) return failed("a simdgroup operation of which some lanes have returned", *first);
  run.simdgroups[index].active = uint32_t((uint64_t(1) << (end - begin)) - 1);
  for (uint32_t i = begin; i < end; i++) run.fibres[i].state = READY;
  run.simdgroups[index].ready = end - begin;
  return true;
}

// The same for a threadgroup, none of whose threads can go on.
bool release_threadgroup() {
  Fibre* first = nullptr;
  bool returned = false;
  for (uint32_t i = 0; i < run.threads; i++) {
    Fibre& fibre = run.fibres[i];
    if (fibre.state == DONE) returned = true;
    else if (!first) first = &fibre;
    else if (fibre.site != first->site)
      return failed("threads are at different threadgroup barriers", fibre);
  }
  if (returned) return failed("a threadgroup barrier of which some threads have returned", *first);
  for (uint32_t i = 0; i < run.threads; i++) run.fibres[i].state = READY;
  for (uint32_t s = 0; s < run.simdgroups.size(); s++)
    run.simdgroups[s].ready = std::min(LANES, run.threads - s * LANES);
  return true;
}

bool run_threadgroup() {
  std::vector<uint32_t> groups, lanes;
  uint32_t done = 0;
  while (done < run.threads) {
    groups.clear();
    for (uint32_t s = 0; s < run.simdgroups.size(); s++)
      if (run.simdgroups[s].ready) groups.push_back(s);
    if (groups.empty()) {
      if (!release_threadgroup()) return false;
      continue;
    }
    // One simdgroup at a time. To let all of them take a step would make every simdgroup operation
    // a barrier of the threadgroup, and hide the barriers that are missing.
    order(groups);
    const uint32_t begin = groups[0] * LANES;
    lanes.clear();
    for (uint32_t i = 0; i < run.simdgroups[groups[0]].ready; i++) lanes.push_back(begin + i);
    run.simdgroups[groups[0]].ready = 0;
    order(lanes);
    for (uint32_t i : lanes) {
      enter(run.fibres[i]);
      if (run.fibres[i].state == DONE) done++;
    }
    if (!release_simdgroup(groups[0])) return false;
  }
  return true;
}

}  // namespace

const Ids* running() { return run.current ? &run.current->ids : nullptr; }

bool run_grid(const Kernel& kernel, const Launch& launch, void** buffers) {
  static const Host host = {exchange, barrier, lane};
  kernel.bind(&host);
  run.kernel = &kernel;
  run.launch = &launch;
  run.buffers = buffers;
  run.random = launch.seed;
  run.current = nullptr;
  run.tsan = __tsan_get_current_fiber();
  uint32_t asked[3], groups[3];
  for (int i = 0; i < 3; i++) {
    asked[i] = std::min(launch.threadgroup[i], launch.grid[i]);  // as MLX does
    groups[i] = asked[i] ? (launch.grid[i] + asked[i] - 1) / asked[i] : 0;
  }
  const uint64_t most = uint64_t(asked[0]) * asked[1] * asked[2];
  if (most > MAX_THREADS) return report("more than 1024 threads in a threadgroup", nullptr), false;
  const size_t memory = size_t(kernel.threadgroup_end - kernel.threadgroup_begin);
  if (memory > THREADGROUP_BYTES)
    return report("more than 32768 bytes of threadgroup memory", nullptr), false;
  if (run.fibres.size() < most) run.fibres.resize(most);

  std::vector<uint32_t> all(size_t(groups[0]) * groups[1] * groups[2]);
  for (uint32_t i = 0; i < all.size(); i++) all[i] = i;
  order(all);
  for (uint32_t i : all) {
    const uint32_t at[3] = {i % groups[0], i / groups[0] % groups[1], i / groups[0] / groups[1]};
    uint32_t size[3];
    for (int a = 0; a < 3; a++) size[a] = std::min(asked[a], launch.grid[a] - at[a] * asked[a]);
    run.threads = size[0] * size[1] * size[2];
    run.simdgroups.resize((run.threads + LANES - 1) / LANES);
    for (uint32_t s = 0; s < run.simdgroups.size(); s++)
      run.simdgroups[s].ready = std::min(LANES, run.threads - s * LANES);
    for (uint32_t t = 0; t < run.threads; t++)
      prepare(run.fibres[t], t, at, groups, asked, size);
    // NaN in every format: who reads what nobody wrote shall not find the last group's numbers.
    for (size_t b = 0; b < memory; b++) ((volatile char*)kernel.threadgroup_begin)[b] = '\xFF';
    __tsan_release(&run.start);
    if (!run_threadgroup()) return false;
    __tsan_acquire(&run.finish);
  }
  return true;
}

}  // namespace emulator
