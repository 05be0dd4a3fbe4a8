// Linear projections: unquantised, FP8, and the grouped output. Source: spec sections 2.0, 2.2, 2.4.
//
// Several groups split the weight's rows and the tokens' columns: group g multiplies columns g K .. of a token's row
// [groups * K] with rows g O / groups .. of the weight [O, K].
#pragma once
#include "rows.cuh"

constexpr int WARPS = 8;

struct Product {
  const bf16* x;
  const void *weight, *scale;
  int T, O, K, scale_bytes, groups;
  const bf16* norm = nullptr;  // weight of the norm, where PREPARE has one
  float eps = 0.f;

  DEVICE const bf16* row(int token, int group) const { return x + (long(token) * groups + group) * K; }
  DEVICE Weights weights() const {
    return {static_cast<const unsigned char*>(weight), static_cast<const unsigned char*>(scale), scale_bytes, O, K};
  }
};

DEVICE void store_value(float* to, float value) { *to = value; }
DEVICE void store_value(bf16* to, float value) { *to = to_bf16(value); }

// A row's eight values as FP8 weights take them: in pair order, rounded to FP8 where ROUND.
template <bool ROUND>
DEVICE uint4 prepare_eight(uint4 raw) {
  if (ROUND) return round_eight(raw);
  const Floats8 in = unpack8(raw);
  return make_uint4(pack_bf16(in.v[0], in.v[4]), pack_bf16(in.v[1], in.v[5]), pack_bf16(in.v[2], in.v[6]),
                    pack_bf16(in.v[3], in.v[7]));
}

// How activations are prepared in the multiplying block: in pair order, and there rounded to FP8, or normed and rounded.
enum class Prepare { NOTHING, ORDER, ROUND, NORM };

// One over the root mean square of each of up to 8 tokens, a warp each.
DEVICE void token_scales(const Product& p, float* scales) {
  const int token = threadIdx.x / 32, lane = threadIdx.x % 32;
  float square = 0.f;
  for (int at = lane * 8; at < p.K && token < p.T; at += 256) {
    const Floats8 v = unpack8(load16(p.row(token, 0) + at));
    for (int i = 0; i < 8; ++i) square += v.v[i] * v.v[i];
  }
  square = warp_sum(square);
  if (lane == 0) scales[token] = rsqrtf(square / p.K + p.eps);
  __syncthreads();
}

DEVICE uint4 norm_eight(uint4 raw, float scale, const bf16* weight) {
  Floats8 v = unpack8(raw);
  const Floats8 gain = unpack8(load16(weight));
  for (int i = 0; i < 8; ++i) v.v[i] = v.v[i] * scale * gain.v[i];
  return pack8(v);
}

// Rows of T tokens of a group in shared memory, prepared; padded to where neighbouring rows do not share banks.
// NORM: for 8 tokens at most and one group; their scales take the room of the sums that follow.
template <Prepare PREPARE>
DEVICE void prepare_shared(const Product& p, int group) {
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  float* scales = reinterpret_cast<float*>(shared_memory() + long(p.T) * (p.K + 32) * 2);
  if (PREPARE == Prepare::NORM) token_scales(p, scales);
  const int parts = p.K / 8, total = p.T * parts;
  for (int base = 0; base < total; base += blockDim.x) {  // 16 lanes round a block together, so none may be missing
    const int i = base + threadIdx.x, token = i / parts, part = i % parts;
    uint4 value = i < total ? load16(p.row(token, group) + 8 * part) : make_uint4(0, 0, 0, 0);
    if (PREPARE == Prepare::NORM && i < total) value = norm_eight(value, scales[token], p.norm + 8 * part);
    value = prepare_eight<PREPARE != Prepare::ORDER>(value);
    if (i < total) store16(shared + token * (p.K + 32) + 8 * part, value);
  }
  __syncthreads();
}

// Few tokens (at most 8 * NT): a block takes 16 weight rows of a group, and its warps share the columns.
// The block takes rows number `rows_of_16` of the group blockIdx.y. Shared memory: T * (K + 32) bf16 where PREPARE, then WARPS * 8*NT * 16
// floats.
template <Format F, int NT, Prepare PREPARE, class Out>
DEVICE void few_tokens(const Product& p, Out* y, int rows_of_16 = blockIdx.x) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = blockIdx.y;
  const int group_rows = p.O / p.groups, row0 = group * group_rows + rows_of_16 * 16;
  const int rows_here = min(16, group_rows - rows_of_16 * 16);
  bf16* shared_rows = reinterpret_cast<bf16*>(shared_memory());
  const bf16* tokens[NT];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int token = min(8 * n + lane / 4, p.T - 1);
    tokens[n] = PREPARE == Prepare::NOTHING ? p.row(token, group) : shared_rows + token * (p.K + 32);
  }
  RowsLane<F> from[1];
  from[0].point(p.weights(), row0);
  float sums[1][NT][4] = {};
  constexpr int AHEAD = NT > 1 || F == Format::BF16 ? 1 : 3;
  multiply_few<F, AHEAD, 1, NT>(sums, from, tokens, warp, WARPS, p.K / 128, [&] {
    if (PREPARE != Prepare::NOTHING) prepare_shared<PREPARE>(p, group);
  });
  const long used = PREPARE == Prepare::NOTHING ? 0 : long(p.T) * (p.K + 32) * 2;
  float* shared = reinterpret_cast<float*>(shared_memory() + used);  // [warp][token][row]
  constexpr int PART = 8 * NT * 16;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared[warp * PART + (8 * n + lane % 4 * 2 + i % 2) * 16 + lane / 4 + i / 2 * 8] = sums[0][n][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.T * 16; i += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += shared[w * PART + i];
    if (i % 16 < rows_here) store_value(y + long(i / 16) * p.O + row0 + i % 16, sum);
  }
}

// Many tokens: a block takes 64 of them and 256 weight rows of a group, 32 a warp.
// grid: token tiles, then row tiles, in x, so that neighbours share weights; groups in y. Shared memory: 2 *
// TILE_BYTES.
template <Format F, class Out>
DEVICE void many_tokens(const Product& p, Out* y) {
  const int token_tiles = (p.T + TILE_ROWS - 1) / TILE_ROWS, lane = threadIdx.x % 32;
  const int token0 = blockIdx.x % token_tiles * TILE_ROWS, group = blockIdx.y, group_rows = p.O / p.groups;
  const int first = (blockIdx.x / token_tiles * TILE_WARPS + threadIdx.x / 32) * 32;  // of the warp, in the group
  const bf16* tokens[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    tokens[j] = p.row(min(token0 + static_cast<int>(threadIdx.x) / 16 + 16 * j, p.T - 1), group);
  }
  RowsLane<F> from[2];
  from[0].point(p.weights(), min(group * group_rows + first, p.O - 1) / 16 * 16);
  from[1].point(p.weights(), min(group * group_rows + first + 16, p.O - 1) / 16 * 16);
  float sums[2][8][4] = {};
  multiply_tile<F>(sums, from, tokens, p.K / 128);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = token0 + 8 * n + lane % 4 * 2 + i % 2, row = first + 16 * m + lane / 4 + i / 2 * 8;
        if (token < p.T && row < group_rows) {
          store_value(y + long(token) * p.O + group * group_rows + row, sums[m][n][i]);
        }
      }
    }
  }
}
