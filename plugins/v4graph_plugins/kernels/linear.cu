// Linear projections: unquantised, FP8, and the grouped output. Source: spec sections 2.0, 2.2, 2.4.
//
// Several groups split the weight's rows and the tokens' columns: group g multiplies columns g K .. of a token's row
// [groups * K] with rows g O / groups .. of the weight [O, K].
#include "rows.cuh"

constexpr int WARPS = 8;

struct Product {
  const bf16* x;
  const void *weight, *scale;
  int T, O, K, scale_bytes, groups;

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

// Rows of T tokens of a group in shared memory, prepared; padded to where neighbouring rows do not share banks.
template <bool ROUND>
DEVICE void prepare_shared(const Product& p, int group) {
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  const int parts = p.K / 8, total = p.T * parts;
  for (int base = 0; base < total; base += blockDim.x) {  // 16 lanes round a block together, so none may be missing
    const int i = base + threadIdx.x, token = i / parts, part = i % parts;
    const uint4 value =
        prepare_eight<ROUND>(i < total ? load16(p.row(token, group) + 8 * part) : make_uint4(0, 0, 0, 0));
    if (i < total) store16(shared + token * (p.K + 32) + 8 * part, value);
  }
  __syncthreads();
}

// Few tokens (at most 8 * NT): a block takes 16 weight rows of a group, and its warps share the columns.
// grid: 16 rows of a group in x, groups in y. Shared memory: T * (K + 32) bf16 where PREPARE, then WARPS * 8*NT * 16
// floats.
enum class Prepare { NOTHING, ORDER, ROUND };

template <Format F, int NT, Prepare PREPARE, class Out>
DEVICE void few_tokens(const Product& p, Out* y) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = blockIdx.y;
  const int group_rows = p.O / p.groups, row0 = group * group_rows + blockIdx.x * 16;
  const int rows_here = min(16, group_rows - static_cast<int>(blockIdx.x) * 16);
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
    if (PREPARE != Prepare::NOTHING) prepare_shared<PREPARE == Prepare::ROUND>(p, group);
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

// Rows [T, K] as FP8 weights take them, eight values a thread.
template <bool ROUND>
DEVICE void prepare_rows(const bf16* x, bf16* prepared, int parts) {
  const long i = long(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint4 value = prepare_eight<ROUND>(i < parts ? load16(x + 8 * i) : make_uint4(0, 0, 0, 0));
  if (i < parts) store16(prepared + 8 * i, value);
}

V4_KERNEL(v4_round_rows, 256, 4, const bf16* x, bf16* prepared, int parts) { prepare_rows<true>(x, prepared, parts); }
V4_KERNEL(v4_order_rows, 256, 4, const bf16* x, bf16* prepared, int parts) { prepare_rows<false>(x, prepared, parts); }

#define V4_LINEAR(name, blocks, function, out)                                                                   \
  V4_KERNEL(name, 256, blocks, const bf16* x, const bf16* weight, out* y, int T, int O, int K, int groups) {      \
    function({x, weight, nullptr, T, O, K, 0, groups}, y);                                                       \
  }
#define V4_FP8_LINEAR(name, blocks, function)                                                                    \
  V4_KERNEL(name, 256, blocks, const bf16* x, const void* weight, const void* scale, bf16* y, int T, int O, int K, \
            int scale_bytes, int groups) {                                                                       \
    function({x, weight, scale, T, O, K, scale_bytes, groups}, y);                                               \
  }
V4_LINEAR(v4_linear_8, 2, (few_tokens<Format::BF16, 1, Prepare::NOTHING, bf16>), bf16)
V4_LINEAR(v4_linear_32, 1, (few_tokens<Format::BF16, 4, Prepare::NOTHING, bf16>), bf16)
V4_LINEAR(v4_linear_many, 1, many_tokens<Format::BF16>, bf16)
V4_LINEAR(v4_linear_f32_8, 2, (few_tokens<Format::BF16, 1, Prepare::NOTHING, float>), float)
V4_LINEAR(v4_linear_f32_32, 1, (few_tokens<Format::BF16, 4, Prepare::NOTHING, float>), float)
V4_LINEAR(v4_linear_f32_many, 1, many_tokens<Format::BF16>, float)
V4_FP8_LINEAR(v4_fp8_linear_inside, 2, (few_tokens<Format::FP8, 1, Prepare::ROUND, bf16>))
V4_FP8_LINEAR(v4_fp8_linear_8, 2, (few_tokens<Format::FP8, 1, Prepare::NOTHING, bf16>))
V4_FP8_LINEAR(v4_fp8_linear_32, 1, (few_tokens<Format::FP8, 4, Prepare::NOTHING, bf16>))
V4_FP8_LINEAR(v4_fp8_linear_many, 1, many_tokens<Format::FP8>)
V4_FP8_LINEAR(v4_fp8_grouped_inside, 2, (few_tokens<Format::FP8_ROUNDED, 1, Prepare::ORDER, bf16>))
V4_FP8_LINEAR(v4_fp8_grouped_8, 2, (few_tokens<Format::FP8_ROUNDED, 1, Prepare::NOTHING, bf16>))
V4_FP8_LINEAR(v4_fp8_grouped_32, 1, (few_tokens<Format::FP8_ROUNDED, 4, Prepare::NOTHING, bf16>))
V4_FP8_LINEAR(v4_fp8_grouped_many, 1, many_tokens<Format::FP8_ROUNDED>)
