// Linear projections: unquantised, FP8, and the grouped output. Source: spec sections 2.0, 2.2, 2.4.
//
// Several groups split the weight's rows and the tokens' columns: group g multiplies columns g K .. of a token's row
// [groups * K] with rows g O / groups .. of the weight [O, K].
#pragma once
#include "tiles.cuh"

constexpr int WARPS = 8;

struct Product {
  const bf16* x;
  const void *weight, *scale;
  int T, O, K, scale_bytes, groups;
  int split = WARPS;           // warps that share the columns of 16 rows; few tokens only
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

// Begin to copy the rows of T tokens of a group, and the norm's weight as one row more, to shared memory; rows are
// padded to where neighbouring ones do not share banks. Before the weights are asked for: what an SM asks for comes
// back in order, and the rows are needed first.
template <Prepare PREPARE>
DEVICE void fetch_shared(const Product& p, int group) {
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  const int parts = p.K / 8, total = (p.T + (PREPARE == Prepare::NORM)) * parts;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    const int token = i / parts, part = i % parts;
    cp_async16(shared + token * (p.K + 32) + 8 * part, (token < p.T ? p.row(token, group) : p.norm) + 8 * part);
  }
  cp_async_commit();
}

// One over the root mean square of each of up to 8 tokens in shared memory, a warp each.
DEVICE void token_scales(const Product& p, const bf16* rows, float* scales) {
  const int token = threadIdx.x / 32, lane = threadIdx.x % 32;
  float square = 0.f;
  for (int at = lane * 8; at < p.K && token < p.T; at += 256) {
    const Floats8 v = unpack8(load16(rows + token * (p.K + 32) + at));
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

// Bytes of shared memory that the rows take.
template <Prepare PREPARE>
DEVICE long prepared_bytes(const Product& p) {
  return PREPARE == Prepare::NOTHING ? 0 : long(p.T + (PREPARE == Prepare::NORM)) * (p.K + 32) * 2;
}

// Prepare the fetched rows where they lie, each thread the pieces that it copied.
// NORM: for 8 tokens at most and one group; their scales take the room of the sums that follow.
template <Prepare PREPARE>
DEVICE void prepare_shared(const Product& p) {
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  const bf16* gain = shared + p.T * (p.K + 32);
  float* scales = reinterpret_cast<float*>(shared_memory() + prepared_bytes<PREPARE>(p));
  cp_async_wait<0>();
  if (PREPARE == Prepare::NORM) {
    __syncthreads();
    token_scales(p, shared, scales);
  }
  const int parts = p.K / 8, total = p.T * parts;
  for (int base = 0; base < total; base += blockDim.x) {  // 16 lanes round a block together, so none may be missing
    const int i = base + threadIdx.x, token = i / parts, part = i % parts;
    bf16* mine = shared + token * (p.K + 32) + 8 * part;
    uint4 value = i < total ? load16(mine) : make_uint4(0, 0, 0, 0);
    if (PREPARE == Prepare::NORM && i < total) value = norm_eight(value, scales[token], gain + 8 * part);
    value = prepare_eight<PREPARE != Prepare::ORDER>(value);
    if (i < total) store16(mine, value);
  }
  __syncthreads();
}

// Blocks of 128 columns that a warp has under way: as many as the registers of 16 warps on a multiprocessor hold.
template <Format F, int NT>
constexpr int BLOCKS_AHEAD = NT > 1 || F == Format::BF16 ? 1 : F == Format::FP8 ? 4 : 2;

// Few tokens (at most 8 * NT): teams of `split` warps take 16 weight rows of a group each and share the columns. The
// block takes rows number `block` of the group blockIdx.y, 16 * WARPS / split of them. Shared memory: the prepared
// rows, then WARPS * 8*NT * 16 floats.
template <Format F, int NT, Prepare PREPARE, class Out>
DEVICE void few_tokens(const Product& p, Out* y, int block = blockIdx.x) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = blockIdx.y, teams = WARPS / p.split;
  const int group_rows = p.O / p.groups, block_row = block * teams * 16, row0 = group * group_rows + block_row;
  bf16* shared_rows = reinterpret_cast<bf16*>(shared_memory());
  if (PREPARE != Prepare::NOTHING) fetch_shared<PREPARE>(p, group);
  const bf16* tokens[NT];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int token = min(8 * n + lane / 4, p.T - 1);
    tokens[n] = PREPARE == Prepare::NOTHING ? p.row(token, group) : shared_rows + token * (p.K + 32);
  }
  RowsLane<F> from[1];
  from[0].point(p.weights(), row0 + warp / p.split * 16);
  float sums[1][NT][4] = {};
  multiply_few<F, BLOCKS_AHEAD<F, NT>, 1, NT>(sums, from, tokens, warp % p.split, p.split, p.K / 128, [&] {
    if (PREPARE != Prepare::NOTHING) prepare_shared<PREPARE>(p);
  });
  float* shared = reinterpret_cast<float*>(shared_memory() + prepared_bytes<PREPARE>(p));  // [warp][token][row]
  constexpr int PART = 8 * NT * 16;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared[warp * PART + (8 * n + lane % 4 * 2 + i % 2) * 16 + lane / 4 + i / 2 * 8] = sums[0][n][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.T * teams * 16; i += blockDim.x) {
    const int row = i % (teams * 16), token = i / (teams * 16);
    const float* parts = shared + row / 16 * p.split * PART + token * 16 + row % 16;
    float sum = 0.f;
    for (int w = 0; w < p.split; ++w) sum += parts[w * PART];
    if (block_row + row < group_rows) store_value(y + long(token) * p.O + row0 + row, sum);
  }
}

// Many tokens: a block takes 64 of them and 256 weight rows of a group, 32 a warp.
// grid (`block` in x): token tiles, then row tiles, so that neighbours share weights; groups in y. Shared memory: 2 *
// STAGE_BYTES.
template <Format F, class Out>
DEVICE void many_tokens(const Product& p, Out* y, int block = blockIdx.x) {
  const int token_tiles = (p.T + TILE_ROWS - 1) / TILE_ROWS, lane = threadIdx.x % 32;
  const int token0 = block % token_tiles * TILE_ROWS, group = blockIdx.y, group_rows = p.O / p.groups;
  const int first = (block / token_tiles * TILE_WARPS + threadIdx.x / 32) * 32;  // of the warp, in the group
  const bf16* row = p.row(min(token0 + static_cast<int>(threadIdx.x) / 4, p.T - 1), group);
  RowsLane<F> from[2];
  from[0].point(p.weights(), min(group * group_rows + first, p.O - 1) / 16 * 16);
  from[1].point(p.weights(), min(group * group_rows + first + 16, p.O - 1) / 16 * 16);
  float sums[2][8][4] = {};
  multiply_tile<F>(sums, from, row, p.K / 128);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = token0 + 8 * n + lane % 4 * 2 + i % 2, at = first + 16 * m + lane / 4 + i / 2 * 8;
        if (token < p.T && at < group_rows) {
          store_value(y + long(token) * p.O + group * group_rows + at, sums[m][n][i]);
        }
      }
    }
  }
}
