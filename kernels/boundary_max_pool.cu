// Maximum over a stretch of time for every channel and segment, and where it was.
//
// Input (N,C,T); segments (N,K,4) in steps of the input: channels below C/2 take the stretch of boundaries 0 and 1, the
// others that of 2 and 3. Boundaries are cut off to whole steps and clamped into the input; an end before its start
// counts as the start.
//
// Macros: WIDTH (1); ELEMENT, the input's type; SEGMENT, the segments'.

#include "common.cuh"

constexpr int LANES = 8;  // threads an output: most stretches are short

__device__ __forceinline__ int step_of(SEGMENT boundary, int64 T) {
  return (int)fminf(fmaxf(to_float(boundary), 0.0f), (float)(T - 1));
}

// Whether a value replaces the best so far: larger, or the first that is not a number, as in torch.max.
__device__ __forceinline__ bool beats(float value, int at, float best, int best_at) {
  const bool nan = value != value, best_nan = best != best;
  if (nan || best_nan) return nan && (!best_nan || at < best_at);
  return value > best || (value == best && at < best_at);
}

// pooled and arguments (N,C,K).
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    boundary_max_pool(const ELEMENT* __restrict__ input, const SEGMENT* __restrict__ segments,
                      ELEMENT* __restrict__ pooled, int* __restrict__ arguments, int64 N, int64 C, int64 T, int64 K) {
  const int lane = threadIdx.x % LANES;
  const int64 output = (blockIdx.x * (int64)THREADS + threadIdx.x) / LANES, count = N * C * K;
  const bool inside = output < count;  // the others only take part in the shuffles
  const int64 k = output % K, c = output / K % C, n = output / K / C;
  float best = __int_as_float(0xff800000);  // minus infinity
  int at = 0x7fffffff;
  if (inside) {
    const SEGMENT* pair = segments + (n * K + k) * 4 + (c < C / 2 ? 0 : 2);
    const int first = step_of(pair[0], T), last = max(first, step_of(pair[1], T));
    const ELEMENT* row = input + (n * C + c) * T;
    for (int t = first + lane; t <= last; t += LANES) {
      const float value = to_float(row[t]);
      if (beats(value, t, best, at)) best = value, at = t;
    }
  }
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, best, step);
    const int other_at = __shfl_xor_sync(0xffffffffu, at, step);
    if (beats(other, other_at, best, at)) best = other, at = other_at;
  }
  if (inside && lane == 0) {
    round_to(best, pooled[output]);
    arguments[output] = at;
  }
}

// Every step sums the gradients of the outputs that chose it, in the order of the segments: no atomics.
// A block takes one row (n,c); its threads the steps.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    boundary_max_pool_grad(const ELEMENT* __restrict__ grad_pooled, const int* __restrict__ arguments,
                           ELEMENT* __restrict__ grad_input, int64 T, int64 K) {
  __shared__ float gradients[THREADS];
  __shared__ int chosen[THREADS];
  const int64 row = blockIdx.x;
  for (int64 from = 0; from < T; from += THREADS) {
    const int64 t = from + threadIdx.x;
    float total = 0;
    for (int64 start = 0; start < K; start += THREADS) {
      const int count = (int)min((int64)THREADS, K - start);
      __syncthreads();
      if (threadIdx.x < count) {
        gradients[threadIdx.x] = to_float(grad_pooled[row * K + start + threadIdx.x]);
        chosen[threadIdx.x] = arguments[row * K + start + threadIdx.x];
      }
      __syncthreads();
      for (int k = 0; k < count; k++)
        if (chosen[k] == t) total += gradients[k];
    }
    if (t < T) round_to(total, grad_input[row * T + t]);
  }
}
