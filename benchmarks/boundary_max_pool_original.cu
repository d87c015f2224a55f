// The algorithm of the original implementation's boundary pooling, to be measured beside genkd's: a thread an output
// that looks through its stretch step by step, forward for the maximum and backward once more for where it was, adding
// to the input's gradient by an atomic. float32.

#include "common.cuh"

__device__ __forceinline__ void stretch(const float* segment, int c, int C, int T, int& first, int& last) {
  const float* pair = segment + (c < C / 2 ? 0 : 2);
  first = (int)fminf(fmaxf(pair[0], 0.0f), (float)(T - 1));
  last = max(first, (int)fminf(fmaxf(pair[1], 0.0f), (float)(T - 1)));
}

extern "C" __global__ void pool(const float* input, const float* segments, float* pooled, int64 N, int64 C_, int64 T_,
                                int64 K_) {
  const int C = (int)C_, T = (int)T_, K = (int)K_;  // 32 bits, as there
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (int)N * C * K) return;
  const int k = i % K, c = i / K % C, n = i / K / C;
  int first, last;
  stretch(segments + (n * K + k) * 4, c, C, T, first, last);
  const float* row = input + (n * C + c) * T;
  float best = row[first];
  for (int t = first + 1; t <= last; t++)
    if (row[t] > best) best = row[t];
  pooled[i] = best;
}

extern "C" __global__ void pool_grad(const float* grad_pooled, const float* input, const float* segments,
                                     float* grad_input, int64 N, int64 C_, int64 T_, int64 K_) {
  const int C = (int)C_, T = (int)T_, K = (int)K_;  // 32 bits, as there
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (int)N * C * K) return;
  const int k = i % K, c = i / K % C, n = i / K / C;
  int first, last;
  stretch(segments + (n * K + k) * 4, c, C, T, first, last);
  const float* row = input + (n * C + c) * T;
  int best = first;
  for (int t = first + 1; t <= last; t++)
    if (row[t] > row[best]) best = t;
  atomicAdd(grad_input + (n * C + c) * T + best, grad_pooled[i]);
}
