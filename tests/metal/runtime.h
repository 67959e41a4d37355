// Between the runtime, a compiled kernel, and emulator.py, which mirrors these structures in ctypes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

// Which thread this is: what Metal gives a kernel as attributes.
struct Ids {
  uint32_t thread_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threadgroup_position_in_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_grid[3];
  uint32_t threads_per_threadgroup[3];           // fewer at a ragged edge of the grid
  uint32_t dispatch_threads_per_threadgroup[3];  // what was asked for
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
};

// What the kernel's metal_host_* functions call.
struct Host {
  const void* (*exchange)(const void* value, size_t size, int site, uint32_t* active);
  void (*barrier)(int whole_threadgroup, int orders_memory, int site);
  uint32_t (*lane)();
};

// What a compiled kernel exports, as `emulator_kernel`.
struct Kernel {
  void (*bind)(const Host*);
  void (*thread)(const Ids*, void** buffers);
  char* threadgroup_begin;
  char* threadgroup_end;
};

struct Buffer {
  const char* name;
  void* data;
  uint64_t bytes;
  int32_t output;
};

struct Range {  // of bytes that the kernel has no business with
  uint64_t buffer, begin, end;
};

// How buffers lie between pages that fault.
enum Guard : int32_t { MIDDLE, AT_END, AT_START };
// Which thread goes first: the two extremes, where one simdgroup runs ahead of all others as far as
// it can, and any interleaving.
enum Schedule : int32_t { IN_ORDER, REVERSED, RANDOM };

struct Launch {
  uint32_t grid[3];  // in threads, as MLX dispatches
  uint32_t threadgroup[3];
  uint64_t seed;
  int32_t schedule, guard;
  int32_t buffer_count, range_count;
  Buffer* buffers;
  Range* ranges;  // heeded under AddressSanitizer only
  char* error;
  uint64_t error_size;
};

}  // namespace emulator

// 0, or 1 with the reason in `launch->error`.
extern "C" int emulator_launch(const emulator::Kernel*, const emulator::Launch*);
