// Stage A of generative feature distillation: three losses of the conditional VAE, and their gradients.
//
// Features, reconstruction and the teacher's reconstruction are `size` elements in one and the same order in memory;
// mean and logvar are (N,T,C), attention (N,C,T).
//
// Macros: WIDTH; HAS_TEACHER; FEATURE, RECONSTRUCTION, TAUGHT, LATENT, ATTENTION, the element types.

#include "common.cuh"

constexpr int LOSSES = 3;  // mse, kl, kd

// The latent's elements of a block, all blocks together covering them.
template <class Each>
__device__ __forceinline__ void each_latent(int64 N, int64 T, int64 C, Each each) {
  const int64 count = N * T * C;
  for (int64 i = blockIdx.x * (int64)THREADS + threadIdx.x; i < count; i += gridDim.x * (int64)THREADS)
    each(i, (i / (T * C) * C + i % C) * T + i / C % T);  // where the attention of latent i is
}

// partial (blocks, LOSSES)
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    generative_kd_sums(const FEATURE* __restrict__ features, const RECONSTRUCTION* __restrict__ reconstruction,
                       const TAUGHT* __restrict__ taught, const LATENT* __restrict__ mean,
                       const LATENT* __restrict__ logvar, const ATTENTION* __restrict__ attention,
                       float* __restrict__ partial, int64 size, int64 N, int64 T, int64 C) {
  float totals[LOSSES] = {};
#pragma unroll 2
  for (int64 at = (blockIdx.x * (int64)THREADS + threadIdx.x) * WIDTH; at < size;
       at += gridDim.x * (int64)THREADS * WIDTH) {
    float values[WIDTH], made[WIDTH];
    load(features + at, values);
    load(reconstruction + at, made);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) totals[0] += (made[i] - values[i]) * (made[i] - values[i]);
#if HAS_TEACHER
    float wanted[WIDTH];
    load(taught + at, wanted);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) totals[2] += (made[i] - wanted[i]) * (made[i] - wanted[i]);
#endif
  }
  each_latent(N, T, C, [&](int64 i, int64 of_attention) {
    const float variance = to_float(logvar[i]), shift = to_float(mean[i]) - to_float(attention[of_attention]);
    totals[1] += shift * shift + expf(variance) - 1.0f - variance;
  });
  block_sum(totals);
  if (threadIdx.x == 0)
    for (int i = 0; i < LOSSES; i++) partial[blockIdx.x * (int64)LOSSES + i] = totals[i];
}

// One block: the losses, averaged.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    generative_kd_finish(const float* __restrict__ partial, float* __restrict__ mse, float* __restrict__ kl,
                         float* __restrict__ kd, int64 blocks, int64 size, int64 N, int64 T, int64 C) {
  float totals[LOSSES] = {};
  for (int64 block = threadIdx.x; block < blocks; block += THREADS)
    for (int i = 0; i < LOSSES; i++) totals[i] += partial[block * LOSSES + i];
  block_sum(totals);
  if (threadIdx.x == 0) {
    *mse = totals[0] / (float)size;
    *kl = 0.5f * totals[1] / (float)(N * T * C);
    *kd = totals[2] / (float)size;
  }
}

// Gradients of reconstruction, mean and logvar, from those of the losses; a loss without a gradient has none to give.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    generative_kd_grad(const FEATURE* __restrict__ features, const RECONSTRUCTION* __restrict__ reconstruction,
                       const TAUGHT* __restrict__ taught, const LATENT* __restrict__ mean,
                       const LATENT* __restrict__ logvar, const ATTENTION* __restrict__ attention,
                       const float* __restrict__ grad_mse, const float* __restrict__ grad_kl,
                       const float* __restrict__ grad_kd, RECONSTRUCTION* __restrict__ grad_reconstruction,
                       LATENT* __restrict__ grad_mean, LATENT* __restrict__ grad_logvar, int64 size, int64 N, int64 T,
                       int64 C) {
  const bool pulls = grad_mse, follows = HAS_TEACHER && grad_kd;
  const float pull = pulls ? 2.0f * *grad_mse / (float)size : 0.0f;
#if HAS_TEACHER
  const float follow = follows ? 2.0f * *grad_kd / (float)size : 0.0f;
#endif
#pragma unroll 2
  for (int64 at = (blockIdx.x * (int64)THREADS + threadIdx.x) * WIDTH; at < size;
       at += gridDim.x * (int64)THREADS * WIDTH) {
    float values[WIDTH], made[WIDTH], result[WIDTH] = {};
    if (pulls || follows) load(reconstruction + at, made);
    if (pulls) {
      load(features + at, values);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) result[i] = pull * (made[i] - values[i]);
    }
#if HAS_TEACHER
    if (follows) {
      load(taught + at, values);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) result[i] += follow * (made[i] - values[i]);
    }
#endif
    store(result, grad_reconstruction + at);
  }
  const float scale = grad_kl ? *grad_kl / (float)(N * T * C) : 0.0f;
  each_latent(N, T, C, [&](int64 i, int64 of_attention) {
    round_to(scale * (to_float(mean[i]) - to_float(attention[of_attention])), grad_mean[i]);
    round_to(0.5f * scale * (expf(to_float(logvar[i])) - 1.0f), grad_logvar[i]);
  });
}
