// A launch's memory: buffers between pages that fault, canaries beside outputs, and what to say when
// either is hit. With EMULATOR_MAIN also the program that sanitizer builds run in, since ASan and
// TSan want the process from its start.
#include "launch.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#ifdef EMULATOR_ASAN
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

namespace emulator {
namespace {

constexpr size_t GUARD = 1 << 20;  // an index that is off by a row or a record still lands in it
constexpr size_t CANARIES = 4096;  // beside a buffer in the MIDDLE
constexpr size_t ALIGNMENT = 16;   // of the widest vector load

struct Region {
  const Buffer* buffer;
  char *mapped, *inner, *inner_end, *data;
  size_t mapped_size;
  // An output's is an odd but valid number; what an input's reader should not get is NaN.
  char fill() const { return buffer->output ? '\xA5' : '\xFF'; }
};

const Launch* launch;
std::vector<Region> regions;
sigjmp_buf escape;

size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

Region place(const Buffer& buffer, Guard guard) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), room = up(buffer.bytes, ALIGNMENT);
  const size_t inner = up(room + (guard == MIDDLE ? 2 * CANARIES : 1), page);
  Region r{&buffer, nullptr, nullptr, nullptr, nullptr, inner + 2 * GUARD};
  r.mapped = (char*)mmap(nullptr, r.mapped_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  r.inner = r.mapped + GUARD;
  r.inner_end = r.inner + (guard == MIDDLE ? inner : up(room, page));
  r.data = guard == AT_END ? r.inner_end - room : guard == AT_START ? r.inner : r.inner + CANARIES;
  const size_t size = size_t(r.inner_end - r.inner);
  mprotect(r.inner, size, PROT_READ | PROT_WRITE);
  memset(r.inner, r.fill(), size);
  memcpy(r.data, buffer.data, buffer.bytes);
  if (!buffer.output) mprotect(r.inner, size, PROT_READ);
  return r;
}

bool intact(const Region& r) {
  for (const char* p = r.inner; p < r.inner_end; p++)
    if ((p < r.data || p >= r.data + r.buffer->bytes) && *p != r.fill()) return false;
  return true;
}

void describe(const char* at, char* text, size_t size) {
  for (const Region& r : regions) {
    if (at < r.mapped || at >= r.mapped + r.mapped_size) continue;
    const char* end = r.data + r.buffer->bytes;
    if (at < r.data)
      snprintf(text, size, "guard: an access %td bytes before `%s`", r.data - at, r.buffer->name);
    else if (at >= end)
      snprintf(text, size, "guard: an access %td bytes past `%s`", at - end, r.buffer->name);
    else
      snprintf(text, size, "guard: a write to `%s`, an input", r.buffer->name);
    return;
  }
  snprintf(text, size, "guard: an access to no buffer at all, or a stack that is full");
}

void fault(int, siginfo_t* info, void*) {
  char text[160];
  describe((const char*)info->si_addr, text, sizeof text);
  report(text, running());
  siglongjmp(escape, 1);
}

// Runs with faults caught. A fault may be a full stack, so the handler has one of its own.
bool guarded(const Kernel& kernel, void** buffers) {
  static char stack[64 * 1024];
  struct sigaction catching {}, segv, bus;
  stack_t ours{}, theirs;
  ours.ss_sp = stack;
  ours.ss_size = sizeof stack;
  catching.sa_sigaction = fault;
  catching.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaltstack(&ours, &theirs);
  sigaction(SIGSEGV, &catching, &segv);
  sigaction(SIGBUS, &catching, &bus);
  // volatile: it must outlive the jump.
  volatile bool good = false;
  if (sigsetjmp(escape, 1) == 0) good = run_grid(kernel, *launch, buffers);
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  sigaltstack(&theirs, nullptr);
  return good;
}

[[maybe_unused]] bool launch_guarded(const Kernel& kernel) {
  std::vector<void*> buffers;
  for (int i = 0; i < launch->buffer_count; i++) {
    regions.push_back(place(launch->buffers[i], Guard(launch->guard)));
    buffers.push_back(regions.back().data);
  }
  bool good = guarded(kernel, buffers.data());
  for (const Region& r : regions) {
    if (good && !intact(r)) {
      char text[160];
      snprintf(text, sizeof text, "canary: a write outside of `%s`", r.buffer->name);
      report(text, nullptr);
      good = false;
    }
    if (r.buffer->output) memcpy(r.buffer->data, r.data, r.buffer->bytes);
    munmap(r.mapped, r.mapped_size);
  }
  regions.clear();
  return good;
}

// Under a sanitizer: blocks from its malloc, which ASan surrounds with red zones to the byte.
[[maybe_unused]] bool launch_sanitized(const Kernel& kernel) {
  std::vector<void*> buffers;
  for (int i = 0; i < launch->buffer_count; i++) {
    const Buffer& b = launch->buffers[i];
    buffers.push_back(malloc(b.bytes));
    memcpy(buffers.back(), b.data, b.bytes);
  }
#ifdef EMULATOR_ASAN
  for (int i = 0; i < launch->range_count; i++) {
    const Range& r = launch->ranges[i];
    __asan_poison_memory_region((char*)buffers[r.buffer] + r.begin, r.end - r.begin);
  }
#endif
  if (!run_grid(kernel, *launch, buffers.data())) {
    // Fibres are still on their way: to free what they use would be a race.
    fprintf(stderr, "emulator: %s\n", launch->error);
    _exit(3);
  }
  for (int i = 0; i < launch->buffer_count; i++) {
    const Buffer& b = launch->buffers[i];
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(buffers[i], b.bytes);
#endif
    if (b.output) memcpy(b.data, buffers[i], b.bytes);
    free(buffers[i]);
  }
  return true;
}

}  // namespace

void report(const char* what, const Ids* where) {
  if (launch->error[0]) return;
  const int n = snprintf(launch->error, launch->error_size, "%s", what);
  if (!where) return;
  const uint32_t* g = where->threadgroup_position_in_grid;
  snprintf(launch->error + n, launch->error_size - size_t(n), " (threadgroup %u,%u,%u thread %u)",
           g[0], g[1], g[2], where->thread_index_in_threadgroup);
}

}  // namespace emulator

extern "C" int emulator_launch(const emulator::Kernel* kernel, const emulator::Launch* launch) {
  emulator::launch = launch;
  launch->error[0] = 0;
#ifdef EMULATOR_MAIN
  return !emulator::launch_sanitized(*kernel);
#else
  return !emulator::launch_guarded(*kernel);
#endif
}

#ifdef EMULATOR_MAIN
// kernel.so, then a file of numbers: the launch, `name bytes output` a buffer, `buffer begin end` a
// range; then a file of the buffers' bytes one after the other, which gets them back.
int main(int argc, char** argv) {
  if (argc < 4) return 0;  // to see whether this sanitizer runs at all here
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
  char error[512] = "";
  emulator::Launch l{};
  l.error = error;
  l.error_size = sizeof error;
  FILE* f = fopen(argv[2], "r");
  bool read = f != nullptr;
  for (int i = 0; i < 3 && read; i++) read = fscanf(f, "%u", &l.grid[i]) == 1;
  for (int i = 0; i < 3 && read; i++) read = fscanf(f, "%u", &l.threadgroup[i]) == 1;
  unsigned long long seed = 0;
  read = read && fscanf(f, "%llu %d %d %d", &seed, &l.schedule, &l.buffer_count,
                        &l.range_count) == 4;
  l.seed = seed;
  std::vector<emulator::Buffer> buffers(size_t(l.buffer_count));
  std::vector<emulator::Range> ranges(size_t(l.range_count));
  std::vector<std::string> names(buffers.size());
  FILE* data = fopen(argv[3], "r+b");
  for (size_t i = 0; i < buffers.size() && read; i++) {
    char name[256];
    unsigned long long bytes = 0;
    read = fscanf(f, "%255s %llu %d", name, &bytes, &buffers[i].output) == 3;
    names[i] = name;
    buffers[i].name = names[i].c_str();
    buffers[i].bytes = bytes;
    buffers[i].data = malloc(bytes);
    read = read && fread(buffers[i].data, 1, bytes, data) == bytes;
  }
  for (emulator::Range& r : ranges) {
    unsigned long long n[3] = {};
    read = read && fscanf(f, "%llu %llu %llu", n, n + 1, n + 2) == 3;
    r = {n[0], n[1], n[2]};
  }
  if (!read) return fprintf(stderr, "the description of the launch is cut short\n"), 2;
  l.buffers = buffers.data();
  l.ranges = ranges.data();
  emulator_launch((const emulator::Kernel*)dlsym(library, "emulator_kernel"), &l);
  rewind(data);
  for (const emulator::Buffer& b : buffers) fwrite(b.data, 1, b.bytes, data);
  return fclose(data) ? 2 : 0;
}
#endif
