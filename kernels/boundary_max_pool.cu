// Maximum over a stretch of time for every channel and segment, and where it was.
//
// Input (N,C,T); segments (N,K,4) in steps of the input: channels below C/2 take the stretch of boundaries 0 and 1, the
// others that of 2 and 3. Boundaries are cut off to whole steps and clamped into the input; an end before its start
// counts as the start.
//
// Macros: WIDTH (1); ELEMENT, the input's type; SEGMENT, the segments'; LANES, threads an output, a power of 2 up to 32.

#include "common.cuh"

constexpr int TILE = 2048;  // steps of a row that are kept in shared memory

__device__ __forceinline__ int step_of(SEGMENT boundary, int64 T) {
  return (int)fminf(fmaxf(to_float(boundary), 0.0f), (float)(T - 1));
}

// Whether a value replaces the best so far: larger, or the first that is not a number, as in torch.max.
__device__ __forceinline__ bool beats(float value, int at, float best, int best_at) {
  const bool nan = value != value, best_nan = best != best;
  if (nan || best_nan) return nan && (!best_nan || at < best_at);
  return value > best || (value == best && at < best_at);
}

// pooled and arguments (N,C,K). A block takes one row (n,c); its threads the segments.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    boundary_max_pool(const ELEMENT* __restrict__ input, const SEGMENT* __restrict__ segments,
                      ELEMENT* __restrict__ pooled, int* __restrict__ arguments, int64 C, int64 T, int64 K) {
  __shared__ float tile[TILE];
  const int64 line = blockIdx.x;
  const int c = (int)(line % C);
  const ELEMENT* row = input + line * T;
  const bool kept = T <= TILE;
  if (kept) {
    for (int t = threadIdx.x; t < T; t += blockDim.x) tile[t] = to_float(row[t]);
    __syncthreads();
  }
  const SEGMENT* pairs = segments + line / C * K * 4 + (c < C / 2 ? 0 : 2);
  const int lane = threadIdx.x % LANES, each = blockDim.x / LANES;
  for (int64 from = 0; from < K; from += each) {
    const int64 k = from + threadIdx.x / LANES;
    const bool inside = k < K;  // the others only take part in the shuffles
    float best = __int_as_float(0xff800000);  // minus infinity
    int at = 0x7fffffff;
    if (inside) {
      const int first = step_of(pairs[k * 4], T), last = max(first, step_of(pairs[k * 4 + 1], T));
      for (int t = first + lane; t <= last; t += LANES) {
        const float value = kept ? tile[t] : to_float(row[t]);
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
      round_to(best, pooled[line * K + k]);
      arguments[line * K + k] = at;
    }
  }
}

// Every step sums the gradients of the outputs that chose it, in the order of the segments: no atomics.
// A block takes one row (n,c); its threads the steps.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    boundary_max_pool_grad(const ELEMENT* __restrict__ grad_pooled, const int* __restrict__ arguments,
                           ELEMENT* __restrict__ grad_input, int64 T, int64 K) {
  // Read four at a time: every thread needs all of them.
  __shared__ float4 gradients[THREADS / 4];
  __shared__ int4 chosen[THREADS / 4];
  const int64 row = blockIdx.x;
  const int size = blockDim.x;
  for (int64 from = 0; from < T; from += size) {
    const int t = (int)from + threadIdx.x;
    float total = 0;
    for (int64 start = 0; start < K; start += size) {
      __syncthreads();
      const int64 k = start + threadIdx.x;
      ((float*)gradients)[threadIdx.x] = k < K ? to_float(grad_pooled[row * K + k]) : 0.0f;
      ((int*)chosen)[threadIdx.x] = k < K ? arguments[row * K + k] : -1;
      __syncthreads();
      const int groups = (int)(min((int64)size, K - start) + 3) / 4;
      for (int group = 0; group < groups; group++) {
        const int4 at = chosen[group];
        const float4 value = gradients[group];
        if (at.x == t) total += value.x;
        if (at.y == t) total += value.y;
        if (at.z == t) total += value.z;
        if (at.w == t) total += value.w;
      }
    }
    if (t < T) round_to(total, grad_input[row * T + t]);
  }
}
