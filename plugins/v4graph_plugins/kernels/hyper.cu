// Hyper-connections: mixes of the four residual streams. Source: spec section 2.1.
//
// V4HyperPre and V4HyperHead take two launches. `mixes` multiplies the streams, laid end to end, with the rows of
// fn over a slice of columns, so that a single token keeps many SMs busy with fn; `pre` and `head` add the slices
// up in a fixed order and do the rest of a token in one block.
#include "device.cuh"

constexpr int STREAMS = 4;
constexpr int SLICE = 256;       // columns of a slice: eight a lane
constexpr int SLICE_TOKENS = 8;  // tokens that share what a block reads of fn

// Sums over the warp of 32 values a lane: lane i gets the sum of value i. 31 shuffles where 32 trees take 160.
DEVICE float transposed_sums(float (&v)[32]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int width = 16 >> step;
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i >= width) continue;
      const float sent = upper ? v[i] : v[i + width];
      v[i] = (upper ? v[i + width] : v[i]) + __shfl_xor_sync(FULL, sent, width);
    }
  }
  return v[0];
}

// partial[slice][token][M + 1]: products with the M rows of fn, then the sum of squares. One block of 4 warps: M / 4
// rows a warp, SLICE columns, SLICE_TOKENS tokens.
// `load(t)` returns the lane's eight values of the block's token t, which is there.
template <int M, class Load>
DEVICE void mixes(const float* fn, float* partial, int T, int K, Load load) {
  constexpr int ROWS = M / 4, VALUES = ROWS * SLICE_TOKENS + 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.y * SLICE + lane * 8;
  const long first = long(blockIdx.x) * SLICE_TOKENS;
  float value[(VALUES + 31) / 32][32] = {};
  float4 rows[ROWS][2];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float4* from = reinterpret_cast<const float4*>(fn + long(warp * ROWS + r) * K + column);
    for (int half = 0; half < 2; ++half) rows[r][half] = column < K ? from[half] : make_float4(0.f, 0.f, 0.f, 0.f);
  }
#pragma unroll
  for (int t = 0; t < SLICE_TOKENS; ++t) {
    const long token = first + t;
    const bool there = token < T && column < K;
    const Floats8 v = unpack8(there ? load(t) : make_uint4(0, 0, 0, 0));
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float4 a = rows[r][0], b = rows[r][1];
      const int i = r * SLICE_TOKENS + t;
      value[i / 32][i % 32] = (a.x * v.v[0] + a.y * v.v[1] + (a.z * v.v[2] + a.w * v.v[3])) +
                              (b.x * v.v[4] + b.y * v.v[5] + (b.z * v.v[6] + b.w * v.v[7]));
    }
    if (t / 2 == warp) {  // each warp squares two of the tokens
      float square = 0.f;
      for (int i = 0; i < 8; ++i) square += v.v[i] * v.v[i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = ROWS * SLICE_TOKENS + half;
        if (t % 2 == half) value[i / 32][i % 32] = square;
      }
    }
  }
#pragma unroll
  for (int part = 0; part < (VALUES + 31) / 32; ++part) {
    const float sum = transposed_sums(value[part]);
    const int i = part * 32 + lane;
    const bool square = i >= ROWS * SLICE_TOKENS;
    const int t = square ? warp * 2 + i - ROWS * SLICE_TOKENS : i % SLICE_TOKENS;
    const int row = square ? M : warp * ROWS + i / SLICE_TOKENS;
    if (i < VALUES && first + t < T) partial[(blockIdx.y * long(T) + first + t) * (M + 1) + row] = sum;
  }
}

DEVICE uint4 load_streams(const bf16* x, int t, int K) {
  return load16(x + (long(blockIdx.x) * SLICE_TOKENS + t) * K + blockIdx.y * SLICE + threadIdx.x % 32 * 8);
}

V4_KERNEL(v4_hyper_mixes_24, 128, 4, const bf16* x, const float* fn, float* partial, int T, int K) {
  mixes<24>(fn, partial, T, K, [&](int t) { return load_streams(x, t, K); });
}

V4_KERNEL(v4_hyper_mixes_4, 128, 4, const bf16* x, const float* fn, float* partial, int T, int K) {
  mixes<4>(fn, partial, T, K, [&](int t) { return load_streams(x, t, K); });
}

// Eight channels of stream k of a token, after the sublayer: z[k] = post[k] y + sum_j comb[j][k] x[j].
DEVICE uint4 post_eight(const Floats8& out, const Floats8 (&streams)[STREAMS], const float* post, const float* comb,
                        int k) {
  Floats8 mixed;
  for (int i = 0; i < 8; ++i) {
    float sum = 0.f;
    for (int j = 0; j < STREAMS; ++j) sum += comb[j * 4 + k] * streams[j].v[i];
    mixed.v[i] = post[k] * out.v[i] + sum;
  }
  return pack8(mixed);
}

// The streams after a sublayer, and what `mixes` makes of them. A slice lies in one stream or more; its tokens' values
// go through shared memory (SLICE_TOKENS * SLICE bf16), two tokens a warp. z is [T, 4, D].
V4_KERNEL(v4_hyper_post_mixes, 128, 4, const bf16* y, const bf16* x, const float* post, const float* comb, bf16* z,
          const float* fn, float* partial, int T, int D) {
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = blockIdx.y * SLICE + lane * 8;
  const int stream = at / D, column = at % D;
  for (int t = 2 * warp; t < 2 * warp + 2; ++t) {
    const long token = long(blockIdx.x) * SLICE_TOKENS + t;
    if (token >= T || stream >= STREAMS) continue;
    Floats8 streams[STREAMS];
#pragma unroll
    for (int j = 0; j < STREAMS; ++j) streams[j] = unpack8(load16(x + (token * STREAMS + j) * D + column));
    const uint4 value =
        post_eight(unpack8(load16(y + token * D + column)), streams, post + token * 4, comb + token * 16, stream);
    store16(shared + t * SLICE + lane * 8, value);
    store16(z + (token * STREAMS + stream) * D + column, value);
  }
  __syncthreads();
  mixes<24>(fn, partial, T, STREAMS * D, [&](int t) { return load16(shared + t * SLICE + lane * 8); });
}

DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// m[0 .. M): the sums of all slices over the root mean square, in shared memory. 8 threads a sum; in double, because
// these few numbers scale everything that follows. `sums` is shared memory of M + 1 floats.
template <int M>
DEVICE void finish_mixes(const float* partial, float* sums, int T, int K, int slices, float eps) {
  const long token = blockIdx.x;
  const int value = threadIdx.x / 8, part = threadIdx.x % 8;
  double sum = 0.0;
  if (value <= M) {
    for (int s = part; s < slices; s += 8) sum += partial[(s * long(T) + token) * (M + 1) + value];
  }
  for (int offset = 4; offset; offset >>= 1) sum += __shfl_xor_sync(FULL, sum, offset);
  double* exact = reinterpret_cast<double*>(sums);
  if (value <= M && part == 0) exact[value] = sum;
  __syncthreads();
  const double scale = 1.0 / sqrt(exact[M] / K + eps);
  const double mine = threadIdx.x < M ? exact[threadIdx.x] : 0.0;
  __syncthreads();
  if (threadIdx.x < M) sums[threadIdx.x] = static_cast<float>(mine * scale);
  __syncthreads();
}

// y = rms_norm(sum_k weights[k] x[k]) for the block's token; `mixed` is shared memory of D bf16, `scratch` of 32
// floats.
DEVICE void mix_and_norm(const bf16* x, const float* weights, const bf16* norm, bf16* y, bf16* mixed, float* scratch,
                         int D, float eps) {
  const long token = blockIdx.x;
  float square = 0.f;
  for (int column = threadIdx.x * 8; column < D; column += blockDim.x * 8) {
    Floats8 sum = {};
    for (int k = 0; k < STREAMS; ++k) {
      const Floats8 stream = unpack8(load16(x + (token * STREAMS + k) * D + column));
      for (int i = 0; i < 8; ++i) sum.v[i] += weights[k] * stream.v[i];
    }
    for (int i = 0; i < 8; ++i) {
      sum.v[i] = round_bf16(sum.v[i]);
      square += sum.v[i] * sum.v[i];
    }
    store16(mixed + column, pack8(sum));
  }
  const float scale = rsqrtf(block_sum(square, scratch) / D + eps);
  for (int column = threadIdx.x * 8; column < D; column += blockDim.x * 8) {  // what this thread has stored itself
    Floats8 v = unpack8(load16(mixed + column));
    const Floats8 gain = unpack8(load16(norm + column));
    for (int i = 0; i < 8; ++i) v.v[i] = v.v[i] * scale * gain.v[i];
    store16(y + token * D + column, pack8(v));
  }
}

// Sinkhorn of a 4x4 matrix in a warp; lane l holds entry l % 16 (row l % 16 / 4), both halves the same.
DEVICE float sinkhorn(float c, int iters, float eps) {
  auto over_columns = [](float v) {
    v += __shfl_xor_sync(FULL, v, 1);
    return v + __shfl_xor_sync(FULL, v, 2);
  };
  auto over_rows = [](float v) {
    v += __shfl_xor_sync(FULL, v, 4);
    return v + __shfl_xor_sync(FULL, v, 8);
  };
  float peak = fmaxf(c, __shfl_xor_sync(FULL, c, 1));
  peak = fmaxf(peak, __shfl_xor_sync(FULL, peak, 2));
  c = expf(c - peak);
  c = c / over_columns(c) + eps;
  c = c / (over_rows(c) + eps);
  for (int i = 1; i < iters; ++i) {
    c = c / (over_columns(c) + eps);
    c = c / (over_rows(c) + eps);
  }
  return c;
}

// Shared memory: 32 doubles of sums, 32 floats of weights, 32 of scratch, D bf16.
V4_KERNEL(v4_hyper_pre, 256, 4, const bf16* x, const float* partial, const float* base, const float* scale,
          const bf16* norm, bf16* y, float* post, float* comb, int T, int D, int slices, int iters, float eps,
          float hc_eps) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  float *weights = sums + 64, *scratch = weights + 32;
  bf16* mixed = reinterpret_cast<bf16*>(scratch + 32);
  finish_mixes<24>(partial, sums, T, STREAMS * D, slices, eps);
  const long token = blockIdx.x;
  const int i = threadIdx.x;
  if (i < 32) {
    const float c = sinkhorn(sums[8 + i % 16] * scale[2] + base[8 + i % 16], iters, hc_eps);
    if (i < 16) comb[token * 16 + i] = c;
    if (i < 4) weights[i] = sigmoid(sums[i] * scale[0] + base[i]) + hc_eps;
    if (i >= 4 && i < 8) post[token * 4 + i - 4] = 2.f * sigmoid(sums[i] * scale[1] + base[i]);
  }
  __syncthreads();
  mix_and_norm(x, weights, norm, y, mixed, scratch, D, eps);
}

V4_KERNEL(v4_hyper_head, 256, 4, const bf16* x, const float* partial, const float* base, const float* scale,
          const bf16* norm, bf16* y, int T, int D, int slices, float eps, float hc_eps) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  float *weights = sums + 64, *scratch = weights + 32;
  bf16* mixed = reinterpret_cast<bf16*>(scratch + 32);
  finish_mixes<4>(partial, sums, T, STREAMS * D, slices, eps);
  if (threadIdx.x < 4) weights[threadIdx.x] = sigmoid(sums[threadIdx.x] * scale[0] + base[threadIdx.x]) + hc_eps;
  __syncthreads();
  mix_and_norm(x, weights, norm, y, mixed, scratch, D, eps);
}

// The streams after a sublayer, for one token and eight channels a thread.
V4_KERNEL(v4_hyper_post, 128, 8, const bf16* y, const bf16* x, const float* post, const float* comb, bf16* z, int D) {
  const long token = blockIdx.x;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (column >= D) return;
  const Floats8 out = unpack8(load16(y + token * D + column));
  Floats8 streams[STREAMS];
#pragma unroll
  for (int j = 0; j < STREAMS; ++j) streams[j] = unpack8(load16(x + (token * STREAMS + j) * D + column));
#pragma unroll
  for (int k = 0; k < STREAMS; ++k) {
    store16(z + (token * STREAMS + k) * D + column, post_eight(out, streams, post + token * 4, comb + token * 16, k));
  }
}
