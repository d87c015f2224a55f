// Stage B of generative feature distillation: features weighted by attention, pooled or as maps, and its two losses.
//
// Features (N,C,T,P), P = H*W positions; a sample's rows are (c,t), row = c*T + t, and rows = C*T. In memory they lie
// as (N,C,T,P), or with LAST as (N,T,P,C), channels_last_3d. Blocks of THREADS threads take a sample's rows in `chunks`
// pieces. Everything is summed in float32, in an order that depends on shapes alone.
//
// Macros: WIDTH; LAST; MAPS (foreground and background maps, else the pooled foreground); HAS_RECONSTRUCTION;
// FEATURE, RECONSTRUCTION, ATTENTION, the element types.

#include "common.cuh"

constexpr int TILE = 4096;      // floats of a block's rows held in shared memory at once
constexpr int MAX_ROWS = 1024;  // rows a block takes at most
constexpr int GROUPS = THREADS / WARP;
constexpr int PARTIALS = 5;  // sums of F, F*a, F*(1-a), (R-F)^2, (a-t)^2
constexpr int STATS = 6;     // of a sample: r, sum F*a, r of the background, sum F*(1-a), its two losses' sums

__device__ __forceinline__ float weight(const ATTENTION* attention, int64 at, int logits) {
  float value = to_float(attention[at]);
  return logits ? sigmoid(value) : value;
}

// Of a sum too small to divide by, 0: the ratio is 0 and passes no gradient. What is not a number stays so.
__device__ __forceinline__ float inverse(float sum) { return fabsf(sum) <= 1.1754944e-38f ? 0.0f : 1.0f / sum; }

// Sums over the positions of each row. read(offset, out) gives COUNT values for WIDTH elements from that offset of the
// tensor, and may keep sums of its own; finish(row, sums) is called once for each row, by one thread.
#if LAST
template <int COUNT, class Read, class Finish>
__device__ void reduce_rows(int64 sample, int chunk, int64 C, int64 T, int64 P, int64, Read read, Finish finish) {
  __shared__ __align__(16) float parts[COUNT][GROUPS][WARP * WIDTH];
  const int lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
  const int64 spans = (C + WARP * WIDTH - 1) / (WARP * WIDTH);
  const int64 t = chunk / spans, first = chunk % spans * (WARP * WIDTH), c = first + lane * WIDTH;
  float sums[COUNT][WIDTH] = {};
  if (c < C) {
    const int64 base = (sample * T + t) * P * C + c;
#pragma unroll (COUNT == 1 ? 2 : 1)
    for (int64 p = group; p < P; p += GROUPS) {
      float values[COUNT][WIDTH];
      read(base + p * C, values);
#pragma unroll
      for (int k = 0; k < COUNT; k++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sums[k][i] += values[k][i];
    }
  }
#pragma unroll
  for (int k = 0; k < COUNT; k++)
#pragma unroll
    for (int i = 0; i < WIDTH; i++) parts[k][group][lane * WIDTH + i] = sums[k][i];
  __syncthreads();
  for (int channel = threadIdx.x; channel < WARP * WIDTH; channel += THREADS) {
    if (first + channel >= C) continue;
    float totals[COUNT] = {};
#pragma unroll
    for (int k = 0; k < COUNT; k++)
#pragma unroll
      for (int g = 0; g < GROUPS; g++) totals[k] += parts[k][g][channel];
    finish((first + channel) * T + t, totals);
  }
}
#else
template <int COUNT, class Read, class Finish>
__device__ void reduce_rows(int64 sample, int chunk, int64 C, int64 T, int64 P, int64 own, Read read, Finish finish) {
  __shared__ __align__(16) float tile[COUNT][TILE];
  const int64 rows = C * T, first = chunk * own;
  const int count = (int)min(own, rows - first);
  const int64 base = (sample * rows + first) * P, size = count * P;
  if (own * P > TILE) {  // one long row
    float sums[COUNT] = {};
#pragma unroll (COUNT == 1 ? 2 : 1)
    for (int64 e = threadIdx.x * WIDTH; e < size; e += THREADS * WIDTH) {
      float values[COUNT][WIDTH];
      read(base + e, values);
#pragma unroll
      for (int k = 0; k < COUNT; k++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sums[k] += values[k][i];
    }
    block_sum(sums);
    if (threadIdx.x == 0) finish(first, sums);
    return;
  }
#pragma unroll (COUNT == 1 ? 2 : 1)
  for (int e = threadIdx.x * WIDTH; e < size; e += THREADS * WIDTH) {
    float values[COUNT][WIDTH];
    read(base + e, values);
#pragma unroll
    for (int k = 0; k < COUNT; k++) stage(values[k], &tile[k][e]);
  }
  __syncthreads();
  int lanes = 1;  // threads a row
  while (lanes < WARP && lanes * 2 * count <= THREADS && lanes < P) lanes *= 2;
  const int lane = threadIdx.x % lanes;
  for (int from = 0; from < count; from += THREADS / lanes) {
    const int row = from + threadIdx.x / lanes;
    float totals[COUNT] = {};
    if (row < count)
      for (int p = lane; p < P; p += lanes)
#pragma unroll
        for (int k = 0; k < COUNT; k++) totals[k] += tile[k][row * (int)P + p];
#pragma unroll
    for (int k = 0; k < COUNT; k++)
      for (int step = lanes / 2; step > 0; step /= 2) totals[k] += __shfl_xor_sync(0xffffffffu, totals[k], step);
    if (row < count && lane == 0) finish(first + row, totals);
  }
}
#endif

// Calls write(offset, coefficients) for every WIDTH elements; prepare(row, out) gives a row's COUNT coefficients.
#if LAST
template <int COUNT, class Prepare, class Write>
__device__ void map_rows(int64 sample, int chunk, int64 C, int64 T, int64 P, int64, Prepare prepare, Write write) {
  __shared__ __align__(16) float of_channels[COUNT][WARP * WIDTH];
  const int lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
  const int64 spans = (C + WARP * WIDTH - 1) / (WARP * WIDTH);
  const int64 t = chunk / spans, first = chunk % spans * (WARP * WIDTH), c = first + lane * WIDTH;
  for (int channel = threadIdx.x; channel < WARP * WIDTH; channel += THREADS) {
    if (first + channel >= C) continue;
    float values[COUNT];
    prepare((first + channel) * T + t, values);
#pragma unroll
    for (int k = 0; k < COUNT; k++) of_channels[k][channel] = values[k];
  }
  __syncthreads();
  if (c >= C) return;
  float coefficients[COUNT][WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; i++)
#pragma unroll
    for (int k = 0; k < COUNT; k++) coefficients[k][i] = of_channels[k][lane * WIDTH + i];
  const int64 base = (sample * T + t) * P * C + c;
#pragma unroll (COUNT < 3 ? 2 : 1)
  for (int64 p = group; p < P; p += GROUPS) write(base + p * C, coefficients);
}
#else
template <int COUNT, class Prepare, class Write>
__device__ void map_rows(int64 sample, int chunk, int64 C, int64 T, int64 P, int64 own, Prepare prepare, Write write) {
  __shared__ float of_rows[COUNT][MAX_ROWS];
  const int64 rows = C * T, first = chunk * own;
  const int count = (int)min(own, rows - first);
  for (int row = threadIdx.x; row < count; row += THREADS) {
    float values[COUNT];
    prepare(first + row, values);
#pragma unroll
    for (int k = 0; k < COUNT; k++) of_rows[k][row] = values[k];
  }
  __syncthreads();
  const int64 base = (sample * rows + first) * P;
  const unsigned size = (unsigned)(count * P);
  for (unsigned e = threadIdx.x * WIDTH; e < size; e += THREADS * WIDTH) {
    unsigned row = e / (unsigned)P, left = (row + 1) * (unsigned)P - e;  // elements until the next row
    float coefficients[COUNT][WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
#pragma unroll
      for (int k = 0; k < COUNT; k++) coefficients[k][i] = of_rows[k][row];
      if (--left == 0) row++, left = (unsigned)P;
    }
    write(base + e, coefficients);
  }
}
#endif

__device__ __forceinline__ void write_losses(float squares, float differences, float* rec, float* att, int64 N, int64 C,
                                             int64 T, int64 P) {
  *rec = squares / ((float)N * (float)(C * T) * (float)P);
  *att = differences / ((float)N * (float)(C * T));
}

// Each block: its rows' sums over the positions (N,C,T), and partial (N,chunks,PARTIALS) of its rows.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    attention_kd_sums(const FEATURE* __restrict__ features, const RECONSTRUCTION* __restrict__ reconstruction,
                      const ATTENTION* __restrict__ attention, const ATTENTION* __restrict__ taught,
                      float* __restrict__ sums, float* __restrict__ partial, int64 C, int64 T, int64 P, int64 own,
                      int64 chunks, int64 logits) {
  const int64 sample = blockIdx.x / chunks;
  const int chunk = (int)(blockIdx.x % chunks);
  float totals[PARTIALS] = {};
  reduce_rows<1>(
      sample, chunk, C, T, P, own,
      [&](int64 at, float (&out)[1][WIDTH]) {
        load(features + at, out[0]);
#if HAS_RECONSTRUCTION
        float made[WIDTH];
        load(reconstruction + at, made);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) totals[3] += (made[i] - out[0][i]) * (made[i] - out[0][i]);
#endif
      },
      [&](int64 row, float (&sum)[1]) {
        const int64 at = sample * C * T + row;
        const float own_weight = weight(attention, at, (int)logits);
        sums[at] = sum[0];
        totals[0] += sum[0], totals[1] += own_weight * sum[0], totals[2] += (1.0f - own_weight) * sum[0];
        if (taught) {
          const float difference = own_weight - weight(taught, at, (int)logits);
          totals[4] += difference * difference;
        }
      });
  block_sum(totals);
  if (threadIdx.x == 0)
    for (int i = 0; i < PARTIALS; i++) partial[blockIdx.x * (int64)PARTIALS + i] = totals[i];
}

// Adds up what attention_kd_sums left of a sample: stats (N,STATS), and the losses where there is one sample; pooled
// (N,C,T-window+1) unless MAPS. `blocks` blocks a sample.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    attention_kd_finish(const float* __restrict__ sums, const float* __restrict__ partial,
                        const ATTENTION* __restrict__ attention, float* __restrict__ stats, float* __restrict__ att,
                        float* __restrict__ rec, FEATURE* __restrict__ pooled, int64 N, int64 C, int64 T, int64 P,
                        int64 window, int64 chunks, int64 blocks, int64 logits) {
  const int64 sample = blockIdx.x / blocks, block = blockIdx.x % blocks;
  float own[PARTIALS] = {};
  for (int64 chunk = threadIdx.x; chunk < chunks; chunk += THREADS)
    for (int i = 0; i < PARTIALS; i++) own[i] += partial[(sample * chunks + chunk) * PARTIALS + i];
  block_sum(own);
  const float ratio = own[0] * inverse(own[1]);
  if (block == 0 && threadIdx.x == 0) {
    float* of_sample = stats + sample * STATS;
    of_sample[0] = ratio, of_sample[1] = own[1], of_sample[2] = own[0] * inverse(own[2]), of_sample[3] = own[2];
    of_sample[4] = own[3], of_sample[5] = own[4];
    if (N == 1) write_losses(own[3], own[4], rec, att, N, C, T, P);
  }
#if !MAPS
  const int64 steps = T - window + 1, size = C * steps;
  const float scale = ratio / (float)(window * P);
  for (int64 i = block * THREADS + threadIdx.x; i < size; i += blocks * THREADS) {
    const int64 first = sample * C * T + i / steps * T + i % steps;
    float value = 0;
    for (int64 at = first; at < first + window; at++) value += weight(attention, at, (int)logits) * sums[at];
    round_to(scale * value, pooled[sample * size + i]);
  }
#endif
}

// One block: the losses of several samples, from their stats.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    attention_kd_losses(const float* __restrict__ stats, float* __restrict__ att, float* __restrict__ rec, int64 N,
                        int64 C, int64 T, int64 P) {
  float sums[2] = {};
  for (int64 sample = threadIdx.x; sample < N; sample += THREADS)
    for (int i = 0; i < 2; i++) sums[i] += stats[sample * STATS + 4 + i];
  block_sum(sums);
  if (threadIdx.x == 0) write_losses(sums[0], sums[1], rec, att, N, C, T, P);
}

#if MAPS
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    attention_kd_maps(const FEATURE* __restrict__ features, const ATTENTION* __restrict__ attention,
                      const float* __restrict__ stats, FEATURE* __restrict__ foreground,
                      FEATURE* __restrict__ background, int64 C, int64 T, int64 P, int64 own, int64 chunks,
                      int64 logits) {
  const int64 sample = blockIdx.x / chunks;
  const float ratio = stats[sample * STATS], opposite = stats[sample * STATS + 2];
  map_rows<2>(
      sample, (int)(blockIdx.x % chunks), C, T, P, own,
      [&](int64 row, float (&out)[2]) {
        const float own_weight = weight(attention, sample * C * T + row, (int)logits);
        out[0] = own_weight * ratio, out[1] = (1.0f - own_weight) * opposite;
      },
      [&](int64 at, float (&by)[2][WIDTH]) {
        float values[WIDTH], front[WIDTH], back[WIDTH];
        load(features + at, values);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) front[i] = values[i] * by[0][i], back[i] = values[i] * by[1][i];
        store(front, foreground + at);
        store(back, background + at);
      });
}

// dots (2,N,C,T): each row's sums of F * gradient of the foreground, and of the background. Either may be missing.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    attention_kd_dots(const FEATURE* __restrict__ features, const FEATURE* __restrict__ grad_foreground,
                      const FEATURE* __restrict__ grad_background, float* __restrict__ dots, int64 N, int64 C, int64 T,
                      int64 P, int64 own, int64 chunks) {
  const int64 sample = blockIdx.x / chunks;
  reduce_rows<2>(
      sample, (int)(blockIdx.x % chunks), C, T, P, own,
      [&](int64 at, float (&out)[2][WIDTH]) {
        float values[WIDTH];
        load(features + at, values);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const FEATURE* gradient = k == 0 ? grad_foreground : grad_background;
          if (gradient) load(gradient + at, out[k]);
#pragma unroll
          for (int i = 0; i < WIDTH; i++) out[k][i] = gradient ? out[k][i] * values[i] : 0.0f;
        }
      },
      [&](int64 row, float (&sum)[2]) {
        dots[sample * C * T + row] = sum[0];
        dots[(N + sample) * C * T + row] = sum[1];
      });
}
#else
// The gradient that the elements of row (c,t) get from the pooled ones, (N,C,T-window+1).
__device__ __forceinline__ float spread(const FEATURE* grad, int64 sample, int64 row, int64 C, int64 T, int64 P,
                                        int64 window) {
  if (!grad) return 0.0f;
  const int64 steps = T - window + 1, c = row / T, t = row % T;
  float value = 0;
  for (int64 step = max(t - window + 1, (int64)0); step <= min(t, steps - 1); step++)
    value += to_float(grad[(sample * C + c) * steps + step]);
  return value / (float)(window * P);
}
#endif

// What the two ratios of a sample get of gradient, from each of its `blocks` blocks: partial (N,blocks,2).
// Without MAPS `grad` is the pooled foreground's gradient; with MAPS, dots.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    attention_kd_slopes(const float* __restrict__ sums, const float* __restrict__ dots,
                        const FEATURE* __restrict__ grad, const ATTENTION* __restrict__ attention,
                        float* __restrict__ partial, int64 N, int64 C, int64 T, int64 P, int64 window, int64 blocks,
                        int64 logits) {
  const int64 sample = blockIdx.x / blocks, rows = C * T;
  float slope[2] = {};
  for (int64 row = blockIdx.x % blocks * THREADS + threadIdx.x; row < rows; row += blocks * THREADS) {
    const int64 at = sample * rows + row;
    const float own_weight = weight(attention, at, (int)logits);
#if MAPS
    slope[0] += own_weight * dots[at], slope[1] += (1.0f - own_weight) * dots[N * rows + at];
#else
    slope[0] += own_weight * sums[at] * spread(grad, sample, row, C, T, P, window);
#endif
  }
  block_sum(slope);
  if (threadIdx.x == 0) partial[blockIdx.x * 2] = slope[0], partial[blockIdx.x * 2 + 1] = slope[1];
}

// The gradient of attention, and of the two ratios' sums, slopes (N,2) = dL/dr / sum. `blocks` blocks a sample.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    attention_kd_attention_grad(const float* __restrict__ sums, const float* __restrict__ dots,
                                const FEATURE* __restrict__ grad, const ATTENTION* __restrict__ attention,
                                const ATTENTION* __restrict__ taught, const float* __restrict__ stats,
                                const float* __restrict__ grad_att, const float* __restrict__ partial,
                                ATTENTION* __restrict__ grad_attention, float* __restrict__ slopes, int64 N, int64 C,
                                int64 T, int64 P, int64 window, int64 blocks, int64 logits) {
  const int64 sample = blockIdx.x / blocks, block = blockIdx.x % blocks, rows = C * T;
  const float ratio = stats[sample * STATS], opposite = stats[sample * STATS + 2];
  float slope[2] = {};
  for (int64 i = threadIdx.x; i < blocks; i += THREADS)
    slope[0] += partial[(sample * blocks + i) * 2], slope[1] += partial[(sample * blocks + i) * 2 + 1];
  block_sum(slope);
  slope[0] *= inverse(stats[sample * STATS + 1]), slope[1] *= inverse(stats[sample * STATS + 3]);
  if (block == 0 && threadIdx.x == 0) slopes[sample * 2] = slope[0], slopes[sample * 2 + 1] = slope[1];
  const bool pulls = taught && grad_att;
  const float pull = pulls ? 2.0f * *grad_att / ((float)N * (float)rows) : 0.0f;
  for (int64 row = block * THREADS + threadIdx.x; row < rows; row += blocks * THREADS) {
    const int64 at = sample * rows + row;
    const float own_weight = weight(attention, at, (int)logits);
#if MAPS
    float value = ratio * (dots[at] - slope[0] * sums[at]) - opposite * (dots[N * rows + at] - slope[1] * sums[at]);
#else
    float value = ratio * sums[at] * (spread(grad, sample, row, C, T, P, window) - slope[0]);
#endif
    if (pulls) value += pull * (own_weight - weight(taught, at, (int)logits));
    if (logits) value *= own_weight * (1.0f - own_weight);
    round_to(value, grad_attention[at]);
  }
}

// The gradients of features and, where wanted, reconstruction.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    attention_kd_grad(const FEATURE* __restrict__ features, const RECONSTRUCTION* __restrict__ reconstruction,
                      const ATTENTION* __restrict__ attention, const float* __restrict__ stats,
                      const float* __restrict__ slopes, const FEATURE* __restrict__ grad_foreground,
                      const FEATURE* __restrict__ grad_background, const float* __restrict__ grad_rec,
                      FEATURE* __restrict__ grad_features, RECONSTRUCTION* __restrict__ grad_reconstruction, int64 N,
                      int64 C, int64 T, int64 P, int64 window, int64 own, int64 chunks, int64 logits) {
  const int64 sample = blockIdx.x / chunks;
  const float ratio = stats[sample * STATS], slope = slopes[sample * 2];
#if HAS_RECONSTRUCTION
  const float pull = grad_rec ? 2.0f * *grad_rec / ((float)N * (float)(C * T) * (float)P) : 0.0f;
#endif
#if MAPS
  const float opposite = stats[sample * STATS + 2], opposite_slope = slopes[sample * 2 + 1];
  constexpr int COEFFICIENTS = 3;
#else
  constexpr int COEFFICIENTS = 1;
#endif
  map_rows<COEFFICIENTS>(
      sample, (int)(blockIdx.x % chunks), C, T, P, own,
      [&](int64 row, float (&out)[COEFFICIENTS]) {
        const float own_weight = weight(attention, sample * C * T + row, (int)logits);
        const float front = own_weight * ratio;
        out[0] = slope * (1.0f - front);
#if MAPS
        const float back = (1.0f - own_weight) * opposite;
        out[0] += opposite_slope * (1.0f - back);
        out[1] = front, out[2] = back;
#else
        out[0] += front * spread(grad_foreground, sample, row, C, T, P, window);
#endif
      },
      [&](int64 at, float (&by)[COEFFICIENTS][WIDTH]) {
        float result[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) result[i] = by[0][i];
#if MAPS
        float gradient[WIDTH];
        if (grad_foreground) {
          load(grad_foreground + at, gradient);
#pragma unroll
          for (int i = 0; i < WIDTH; i++) result[i] += by[1][i] * gradient[i];
        }
        if (grad_background) {
          load(grad_background + at, gradient);
#pragma unroll
          for (int i = 0; i < WIDTH; i++) result[i] += by[2][i] * gradient[i];
        }
#endif
#if HAS_RECONSTRUCTION
        float values[WIDTH], made[WIDTH];
        load(features + at, values);
        load(reconstruction + at, made);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
          made[i] = pull * (made[i] - values[i]);
          result[i] -= made[i];
        }
        if (grad_reconstruction) store(made, grad_reconstruction + at);
#endif
        store(result, grad_features + at);
      });
}
