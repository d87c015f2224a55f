// CUDA's built-ins on a CPU, as far as the kernels use them: a block's threads are fibers of one thread, blocks run one
// after another. A fiber runs until it waits; a barrier opens when all threads of the block that have not returned are
// at it, a shuffle when all those of the warp are. Where neither can happen, the launch fails and says so.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("block_memory")))
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }

inline float to_float(fp16 value) { return (float)same_bits<_Float16>(value.bits); }
inline void round_to(float value, fp16& result) { result.bits = same_bits<unsigned short>((_Float16)value); }
inline void round_to(float value, bf16& result) {
  const unsigned bits = same_bits<unsigned>(value);
  const bool nan = value != value;  // to nearest, ties to even
  result.bits = (unsigned short)(nan ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static const char* problem = nullptr;

// All shared memory: not a number when a block begins, as it may hold anything.
extern "C" char __start_block_memory[] __attribute__((weak)), __stop_block_memory[] __attribute__((weak));

inline void check_16(const void* address) {
  if ((uintptr_t)address % 16) problem = "an access of 16 bytes is not aligned";
}
inline uint4 load_16(const void* from) {
  check_16(from);
  uint4 words;
  memcpy(&words, from, sizeof words);
  return words;
}
inline void store_16(uint4 words, void* to) {
  check_16(to);
  memcpy(to, &words, sizeof words);
}

namespace cpu {

constexpr size_t STACK = 1 << 16;
enum State { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fiber {
  ucontext_t context;
  State state;
  bool odd;  // whose turn of the two buffers its next shuffle uses
};

static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static std::vector<unsigned> exchanged[2];
static ucontext_t scheduler;
static void* kernel;
static const int64_t* arguments;
static int argument_count;

inline void wait_at(State state) {
  Fiber& own = fibers[threadIdx.x];
  own.state = state;
  const unsigned thread = threadIdx.x;
  swapcontext(&own.context, &scheduler);
  threadIdx.x = thread;
}

template <size_t... I>
void call(std::index_sequence<I...>) {
  ((void (*)(decltype((void)I, int64_t())...))kernel)(arguments[I]...);
}
template <size_t N = 0>
void call_with_all() {
  if constexpr (N > 24) {
    problem = "a kernel has too many arguments";
  } else if (N == (size_t)argument_count) {
    call(std::make_index_sequence<N>());
  } else {
    call_with_all<N + 1>();
  }
}

static void thread_main() {
  call_with_all();
  fibers[threadIdx.x].state = DONE;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// Lets go all of a range of fibers if all that are not done wait at `state`; whether any was let go.
inline bool release(unsigned from, unsigned to, State state) {
  bool any = false;
  for (unsigned i = from; i < to; i++) {
    if (fibers[i].state != state && fibers[i].state != DONE) return false;
    any |= fibers[i].state == state;
  }
  for (unsigned i = from; any && state == AT_SHUFFLE && i < to; i++)
    if (fibers[i].state == DONE) problem = "a thread has returned before a shuffle of its warp";
  for (unsigned i = from; any && i < to; i++)
    if (fibers[i].state == state) fibers[i].state = READY;
  return any;
}

static void run_block() {
  const unsigned threads = blockDim.x;
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * STACK;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    fiber.state = READY, fiber.odd = false;
    makecontext(&fiber.context, thread_main, 0);
  }
  const unsigned warps = (threads + 31) / 32;
  while (!problem) {
    // A warp runs as far as it can before the next begins, the last one first in every other block: what a barrier
    // should keep apart would meet.
    for (unsigned turn = 0; turn < warps; turn++) {
      const unsigned first = 32 * (blockIdx.x % 2 ? warps - 1 - turn : turn), last = min(first + 32, threads);
      do {
        for (unsigned i = first; i < last; i++) {
          if (fibers[i].state != READY) continue;
          threadIdx.x = i;
          swapcontext(&scheduler, &fibers[i].context);
        }
      } while (release(first, last, AT_SHUFFLE) && !problem);
    }
    if (release(0, threads, AT_BARRIER)) continue;
    for (unsigned i = 0; i < threads; i++)
      if (fibers[i].state != DONE) problem = "threads wait at different places";
    return;
  }
}

}  // namespace cpu

inline float atomicAdd(float* address, float value) {
  const float before = *address;
  *address += value;
  return before;
}

inline void __syncthreads() { cpu::wait_at(cpu::AT_BARRIER); }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  cpu::Fiber& own = cpu::fibers[threadIdx.x];
  std::vector<unsigned>& buffer = cpu::exchanged[own.odd];
  own.odd = !own.odd;
  buffer[threadIdx.x] = same_bits<unsigned>(value);
  cpu::wait_at(cpu::AT_SHUFFLE);
  return same_bits<T>(buffer[threadIdx.x ^ mask]);
}

// Runs blocks first to last of a grid; all arguments are 64 bits wide. Returns what went wrong, or null.
extern "C" const char* launch(void* kernel, int64_t first, int64_t last, int64_t blocks, int threads,
                              const int64_t* arguments, int argument_count) {
  cpu::kernel = kernel, cpu::arguments = arguments, cpu::argument_count = argument_count;
  cpu::fibers.resize(threads), cpu::stacks.resize(threads * cpu::STACK);
  for (auto& buffer : cpu::exchanged) buffer.resize(threads);
  problem = nullptr;
  gridDim.x = (unsigned)blocks, blockDim.x = threads;
  for (int64_t block = first; block <= last && !problem; block++) {
    blockIdx.x = (unsigned)block;
    if (__start_block_memory) memset(__start_block_memory, 0xff, __stop_block_memory - __start_block_memory);
    cpu::run_block();
  }
  return problem;
}
