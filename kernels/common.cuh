// What the kernels share: element types, vector loads and stores, reductions in a fixed order.
//
// Compiled by NVRTC, and as C++ for tests on a CPU, where cpu.hpp supplies the CUDA built-ins.
// WIDTH, elements a thread moves at once, is 8 where addresses and sizes allow 16-byte accesses, else 1.

#pragma once

typedef long long int64;

struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};

#ifdef __CUDACC_RTC__
__device__ __forceinline__ float to_float(fp16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
__device__ __forceinline__ void round_to(float value, fp16& result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}
__device__ __forceinline__ void round_to(float value, bf16& result) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}
// 16 bytes of global memory in one access: the compiler splits a store of a uint4 into four where it unrolls a loop.
__device__ __forceinline__ uint4 load_16(const void* from) {
  uint4 words;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(from));
  return words;
}
__device__ __forceinline__ void store_16(uint4 words, void* to) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}
#else
#include "cpu.hpp"
#endif
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
__device__ __forceinline__ void round_to(float value, float& result) { result = value; }

// WIDTH consecutive elements of global memory as floats; 16 bytes an access where WIDTH is 8.
template <class T>
__device__ __forceinline__ void load(const T* __restrict__ from, float (&to)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    to[0] = to_float(*from);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int part = 0; part < WIDTH / 4; part++) {
      uint4 four = load_16(from + 4 * part);
      to[4 * part] = __uint_as_float(four.x), to[4 * part + 1] = __uint_as_float(four.y);
      to[4 * part + 2] = __uint_as_float(four.z), to[4 * part + 3] = __uint_as_float(four.w);
    }
  } else {
    uint4 eight = load_16(from);
    unsigned words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int part = 0; part < WIDTH; part++) {
      T element;
      element.bits = (unsigned short)(words[part / 2] >> (16 * (part % 2)));
      to[part] = to_float(element);
    }
  }
}

template <class T>
__device__ __forceinline__ void store(const float (&from)[WIDTH], T* __restrict__ to) {
  if constexpr (WIDTH == 1) {
    round_to(from[0], *to);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int part = 0; part < WIDTH / 4; part++)
      store_16(make_uint4(__float_as_uint(from[4 * part]), __float_as_uint(from[4 * part + 1]),
                          __float_as_uint(from[4 * part + 2]), __float_as_uint(from[4 * part + 3])),
               to + 4 * part);
  } else {
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int part = 0; part < WIDTH; part++) {
      T element;
      round_to(from[part], element);
      words[part / 2] |= (unsigned)element.bits << (16 * (part % 2));
    }
    store_16(make_uint4(words[0], words[1], words[2], words[3]), to);
  }
}

// The same for floats of shared memory.
__device__ __forceinline__ void stage(const float (&from)[WIDTH], float* to) {
  if constexpr (WIDTH == 1) {
    to[0] = from[0];
  } else {
#pragma unroll
    for (int part = 0; part < WIDTH / 4; part++)
      reinterpret_cast<float4*>(to)[part] =
          make_float4(from[4 * part], from[4 * part + 1], from[4 * part + 2], from[4 * part + 3]);
  }
}

constexpr int THREADS = 256;
constexpr int WARP = 32;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Sums of COUNT values over the block, on every thread. All threads of the block must call it.
template <int COUNT>
__device__ __forceinline__ void block_sum(float (&values)[COUNT]) {
  __shared__ float of_warps[WARP][COUNT];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
  for (int i = 0; i < COUNT; i++)
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) values[i] += __shfl_xor_sync(0xffffffffu, values[i], step);
  __syncthreads();  // a former call's sums have been read
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < COUNT; i++) of_warps[warp][i] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    values[i] = 0;
    for (int w = 0; w < warps; w++) values[i] += of_warps[w][i];
  }
}
