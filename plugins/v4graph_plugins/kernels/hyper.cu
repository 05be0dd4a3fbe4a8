// Hyper-connections: mixes of the four residual streams. Source: spec section 2.1.
//
// V4HyperPre and V4HyperHead take two launches. `mixes` multiplies the streams, laid end to end, with the rows of
// fn over a slice of columns, so that a single token keeps many SMs busy with fn; `pre` and `head` add the slices
// up in a fixed order and do the rest of a token in one block.
#include "device.cuh"

constexpr int STREAMS = 4;
constexpr int SLICE = 256;       // columns of a slice: eight a lane
constexpr int SLICE_TOKENS = 8;  // tokens that share what a block reads of fn

// Sums over the warp of N values a lane (a power of two): lane i gets the sum of value i / (32 / N). For 32 values 31
// shuffles where 32 trees take 160. Lanes meet in the same order whatever N is, so a sum has the same bits.
template <int N>
DEVICE float transposed_sums(float (&v)[N]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int width = 16 >> step, count = N >> (step + 1);
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i >= count) continue;
      const float sent = upper ? v[i] : v[i + count];
      v[i] = (upper ? v[i + count] : v[i]) + __shfl_xor_sync(FULL, sent, width);
    }
    if (count == 0) v[0] += __shfl_xor_sync(FULL, v[0], width);
  }
  return v[0];
}

// A lane's eight columns of the slice in a warp's M / 4 rows of fn. Loaded before anything else: fn comes from memory,
// the streams from the cache.
template <int M>
struct Rows {
  float4 part[M / 4][2];

  DEVICE Rows(const float* fn, int K) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.y * SLICE + lane * 8;
#pragma unroll
    for (int r = 0; r < M / 4; ++r) {
      const float4* from = reinterpret_cast<const float4*>(fn + long(warp * (M / 4) + r) * K + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) part[r][half] = column < K ? from[half] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
};

// partial[slice][token][M + 1]: products with the M rows of fn, then the sum of squares. One block of 4 warps: M / 4
// rows a warp, SLICE columns, TOKENS tokens.
// `load(t)` returns the lane's eight values of the block's token t, which is there.
template <int M, int TOKENS, class Load>
DEVICE void multiply_tokens(const Rows<M>& rows, float* partial, int T, int K, Load load) {
  constexpr int ROWS = M / 4, SQUARES = TOKENS > 4 ? TOKENS / 4 : 1, VALUES = ROWS * TOKENS + SQUARES;
  constexpr int EACH = VALUES > 16 ? 32 : VALUES > 8 ? 16 : VALUES > 2 ? 8 : 2;
  constexpr int PARTS = (VALUES + EACH - 1) / EACH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.y * SLICE + lane * 8;
  const long first = long(blockIdx.x) * SLICE_TOKENS;
  float value[PARTS][EACH] = {};
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const bool there = first + t < T && column < K;
    const Floats8 v = unpack8(there ? load(t) : make_uint4(0, 0, 0, 0));
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float4 a = rows.part[r][0], b = rows.part[r][1];
      const int i = r * TOKENS + t;
      value[i / EACH][i % EACH] = (a.x * v.v[0] + a.y * v.v[1] + (a.z * v.v[2] + a.w * v.v[3])) +
                                  (b.x * v.v[4] + b.y * v.v[5] + (b.z * v.v[6] + b.w * v.v[7]));
    }
    if (t / SQUARES == warp) {  // each warp squares its share of the tokens
      float square = 0.f;
      for (int i = 0; i < 8; ++i) square += v.v[i] * v.v[i];
#pragma unroll
      for (int own = 0; own < SQUARES; ++own) {
        const int i = ROWS * TOKENS + own;
        if (t % SQUARES == own) value[i / EACH][i % EACH] = square;
      }
    }
  }
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const float sum = transposed_sums<EACH>(value[part]);
    const int i = part * EACH + lane / (32 / EACH);
    const bool square = i >= ROWS * TOKENS;
    const int t = square ? warp * SQUARES + i - ROWS * TOKENS : i % TOKENS;
    const int row = square ? M : warp * ROWS + i / TOKENS;
    const bool mine = lane % (32 / EACH) == 0 && i < VALUES && t < TOKENS && first + t < T;
    if (mine) partial[(blockIdx.y * long(T) + first + t) * (M + 1) + row] = sum;
  }
}

// The same for the block's tokens: a single one, as in decode, does not pay for SLICE_TOKENS.
template <int M, class Load>
DEVICE void mixes(const Rows<M>& rows, float* partial, int T, int K, Load load) {
  if (T == 1) {
    multiply_tokens<M, 1>(rows, partial, T, K, load);
  } else {
    multiply_tokens<M, SLICE_TOKENS>(rows, partial, T, K, load);
  }
}

DEVICE uint4 load_streams(const bf16* x, int t, int K) {
  return load16(x + (long(blockIdx.x) * SLICE_TOKENS + t) * K + blockIdx.y * SLICE + threadIdx.x % 32 * 8);
}

V4_KERNEL(v4_hyper_mixes_24, 128, 4, const bf16* x, const float* fn, float* partial, int T, int K) {
  mixes<24>(Rows<24>(fn, K), partial, T, K, [&](int t) { return load_streams(x, t, K); });
}

V4_KERNEL(v4_hyper_mixes_4, 128, 4, const bf16* x, const float* fn, float* partial, int T, int K) {
  mixes<4>(Rows<4>(fn, K), partial, T, K, [&](int t) { return load_streams(x, t, K); });
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
  const Rows<24> rows(fn, STREAMS * D);
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
  mixes<24>(rows, partial, T, STREAMS * D, [&](int t) { return load16(shared + t * SLICE + lane * 8); });
}

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

// Blocks (token, 0) mix and norm; the last in y makes post and comb, which takes as long and needs one warp. One block
// does both where there are many tokens. Shared memory: as `Token`.
V4_KERNEL(v4_hyper_pre, 256, 4, const bf16* x, const float* partial, const float* base, const float* scale,
          const bf16* norm, bf16* y, float* post, float* comb, int T, int D, int slices, int iters, float eps,
          float hc_eps) {
  const Token shared(shared_memory());
  const int lane = threadIdx.x % 32, value = min(lane, 23);
  const bool mixing = blockIdx.y == 0;
  const float add = base[value], by = scale[value < 4 ? 0 : value < 8 ? 1 : 2];
  const float mix = finish_mixes<24>(shared, partial, T, STREAMS * D, slices, eps, [&] {
    if (mixing) stage(shared, x, norm, D);
  });
  const float logit = mix * by + add;
  if (mixing) mix_and_norm(shared, sigmoid(logit) + hc_eps, y, D, eps);
  if (threadIdx.x >= 32 || blockIdx.y + 1 < gridDim.y) return;
  const long token = blockIdx.x;
  const float c = sinkhorn(__shfl_sync(FULL, logit, 8 + lane % 16), iters, hc_eps);
  if (lane < 16) comb[token * 16 + lane] = c;
  if (lane >= 4 && lane < 8) post[token * 4 + lane - 4] = 2.f * sigmoid(logit);
}

V4_KERNEL(v4_hyper_head, 256, 4, const bf16* x, const float* partial, const float* base, const float* scale,
          const bf16* norm, bf16* y, int T, int D, int slices, float eps, float hc_eps) {
  const Token shared(shared_memory());
  const float add = base[threadIdx.x % 4], by = scale[0];
  const float mix = finish_mixes<4>(shared, partial, T, STREAMS * D, slices, eps, [&] { stage(shared, x, norm, D); });
  mix_and_norm(shared, sigmoid(mix * by + add) + hc_eps, y, D, eps);
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
