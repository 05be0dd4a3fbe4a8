// A token's part of the hyper-connections, in one block: the mixes from their slices, Sinkhorn, the weighted sum of the
// streams and its RMSNorm. Source: spec section 2.1.
#pragma once
#include "device.cuh"

constexpr int STREAMS = 4;

DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Shared memory of `pre` and `head`: sums of every warp, then a token's streams and the norm's weight.
constexpr int WARPS = 8;

struct Token {
  double* sums;    // [WARPS][32]
  float* squares;  // [32]
  bf16* staged;    // [STREAMS + 1][D]

  DEVICE explicit Token(unsigned char* base) {
    sums = reinterpret_cast<double*>(base);
    squares = reinterpret_cast<float*>(sums + WARPS * 32);
    staged = reinterpret_cast<bf16*>(squares + 32);
  }
};

// Begin to copy what `mix_and_norm` needs; a thread reads only what it has copied itself.
DEVICE void stage(const Token& shared, const bf16* x, const bf16* norm, int D) {
  for (int column = threadIdx.x * 8; column < D; column += blockDim.x * 8) {
#pragma unroll
    for (int k = 0; k < STREAMS; ++k) {
      cp_async16(shared.staged + k * D + column, x + (long(blockIdx.x) * STREAMS + k) * D + column);
    }
    cp_async16(shared.staged + STREAMS * D + column, norm + column);
  }
  cp_async_commit();
}

DEVICE double sum_of(const double (&v)[8]) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

// Lane v < M gets mix v of the block's token, in every warp: the sum of all slices over the root mean square. In
// double, because these few numbers scale everything that follows. `meanwhile` runs while the slices are on their way.
template <int M, class Meanwhile>
DEVICE float finish_mixes(const Token& shared, const float* partial, int T, int K, int slices, float eps,
                          Meanwhile meanwhile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* mine = partial + long(blockIdx.x) * (M + 1) + lane;
  float part[8];
  auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int slice = first + WARPS * i;
      part[i] = lane <= M && slice < slices ? mine[long(slice) * T * (M + 1)] : 0.f;
    }
  };
  auto total = [&] {
    const double exact[8] = {part[0], part[1], part[2], part[3], part[4], part[5], part[6], part[7]};
    return sum_of(exact);
  };
  load(warp);
  meanwhile();
  const double share = 1.0 / K;
  double sum = total();
  for (int first = warp + WARPS * 8; first < slices; first += WARPS * 8) {
    load(first);
    sum += total();
  }
  shared.sums[warp * 32 + lane] = sum;
  __syncthreads();
  double of_warps[WARPS];
#pragma unroll
  for (int w = 0; w < WARPS; ++w) of_warps[w] = shared.sums[w * 32 + lane];
  sum = sum_of(of_warps);
  return static_cast<float>(sum * rsqrt(__shfl_sync(FULL, sum, M) * share + eps));
}

// y = rms_norm(sum_k weight[k] x[k]) for the block's token, `weight` being that of lanes 0 to 3.
DEVICE void mix_and_norm(const Token& shared, float weight, bf16* y, int D, float eps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float weights[STREAMS], square = 0.f;
#pragma unroll
  for (int k = 0; k < STREAMS; ++k) weights[k] = __shfl_sync(FULL, weight, k);
  cp_async_wait<0>();
  for (int column = threadIdx.x * 8; column < D; column += blockDim.x * 8) {
    Floats8 sum = {};
#pragma unroll
    for (int k = 0; k < STREAMS; ++k) {
      const Floats8 stream = unpack8(load16(shared.staged + k * D + column));
      for (int i = 0; i < 8; ++i) sum.v[i] += weights[k] * stream.v[i];
    }
    for (int i = 0; i < 8; ++i) {
      sum.v[i] = round_bf16(sum.v[i]);
      square += sum.v[i] * sum.v[i];
    }
    store16(shared.staged + column, pack8(sum));  // over the first stream, which this thread has read
  }
  square = warp_sum(square);
  if (lane == 0) shared.squares[warp] = square;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += shared.squares[w];
  const float scale = rsqrtf(total / D + eps);
  for (int column = threadIdx.x * 8; column < D; column += blockDim.x * 8) {
    Floats8 v = unpack8(load16(shared.staged + column));
    const Floats8 gain = unpack8(load16(shared.staged + STREAMS * D + column));
    for (int i = 0; i < 8; ++i) v.v[i] = v.v[i] * scale * gain.v[i];
    store16(y + long(blockIdx.x) * D + column, pack8(v));
  }
}

// One half of a Sinkhorn step. The matrix stays as it was and its rows and columns are scaled by reciprocals: entry
// (i, j) is c[i][j] / (rows[i] * columns[j]). Dividing the columns by their sums plus eps then reads
// columns[j] = sum_i c[i][j] / rows[i] + eps * columns[j]. The four divisions share one reciprocal, which is on its way
// while the rest is summed up: these halves wait for each other 2 * iters times.
template <bool COLUMNS>
DEVICE void normalise(const float (&c)[16], const float (&by)[4], float (&mine)[4], float eps) {
  const float ab = by[0] * by[1], cd = by[2] * by[3], inverse = approximate_reciprocal(ab * cd);
  const float others[4] = {by[1] * cd, by[0] * cd, ab * by[3], ab * by[2]};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += c[COLUMNS ? i * 4 + j : j * 4 + i] * others[i];
    mine[j] = inverse * sum + eps * mine[j];
  }
}

DEVICE float pick(const float (&v)[4], int i) { return i < 2 ? (i ? v[1] : v[0]) : (i == 2 ? v[2] : v[3]); }

// Sinkhorn of a 4x4 matrix; lane l holds entry l % 16 (row l % 16 / 4). Every lane does all of it: shuffles take longer.
DEVICE float sinkhorn(float logit, int iters, float eps) {
  const int lane = threadIdx.x % 32;
  float peak = fmaxf(logit, __shfl_xor_sync(FULL, logit, 1));
  peak = fmaxf(peak, __shfl_xor_sync(FULL, peak, 2));
  const float raised = expf(logit - peak);
  const float pair = raised + __shfl_xor_sync(FULL, raised, 1);
  const float mine = raised / (pair + __shfl_xor_sync(FULL, pair, 2)) + eps;
  float c[16], rows[4] = {1.f, 1.f, 1.f, 1.f}, columns[4] = {1.f, 1.f, 1.f, 1.f};
#pragma unroll
  for (int i = 0; i < 16; ++i) c[i] = __shfl_sync(FULL, mine, i);
  normalise<true>(c, rows, columns, eps);
#pragma unroll 1
  for (int i = 1; i < iters; ++i) {
    normalise<false>(c, columns, rows, eps);
    normalise<true>(c, rows, columns, eps);
  }
  return mine / (pick(rows, lane % 16 / 4) * pick(columns, lane % 4));
}
