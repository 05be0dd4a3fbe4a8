// The experts where each has few rows (decode): a matrix is read once for up to 8 or 32 rows. Source: spec section 3.
#include "moe_experts.cuh"

constexpr int UP_WARPS = 4;    // share the channels of 16 rows of w1 and of w3
constexpr int DOWN_WARPS = 8;  // 16 rows of w2 each

// Rows of this lane's tokens in the mma's columns; columns past the last are the last again.
template <int NT, class RowOf>
DEVICE void token_rows(const bf16* (&rows)[NT], int count, RowOf row_of) {
#pragma unroll
  for (int n = 0; n < NT; ++n) rows[n] = row_of(min(8 * n + int(threadIdx.x) % 32 / 4, count - 1));
}

struct Up {
  const bf16* x;  // tokens [T, D], rounded in quantised forms
  const int* token_of;
  const float* gain_of;
  const int4* tiles;
  Matrices w1, w3, s1, s3;
  bf16* inner;
  int T, D, I, Is;
  float limit;
};

template <Format F, int NT>
DEVICE void up_sums(float (&sums)[2][NT][4], const Matrices& w1, const Matrices& w3, int expert, int width, int D,
                    int row0, const bf16* const (&rows)[NT]) {
  RowsLane<F> from[2];
  from[0].point(expert_weights(w1, expert, width, D), row0);
  from[1].point(expert_weights(w3, expert, width, D), row0);
  constexpr int AHEAD = F == Format::FP4 && NT == 1 ? 2 : 1;
  multiply_few<F, AHEAD, 2, NT>(sums, from, rows, threadIdx.x / 32, UP_WARPS, D / 128, [] {});
}

// Gate and value of the tile's tokens from the sums of the block's warps, and the activation.
// Shared memory: UP_WARPS * 2 * 8*NT * 16 floats.
template <Format F, int NT>
DEVICE void store_up(const Up& p, const Tile& tile, const float (&sums)[2][NT][4], int width) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // [warp][matrix][token][row]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = 8 * NT * 16;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
        shared[(warp * 2 + m) * part + token * 16 + row] = sums[m][n][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile.count * 16; i += blockDim.x) {
    float gate = 0.f, value = 0.f;
    for (int w = 0; w < UP_WARPS; ++w) {
      gate += shared[2 * w * part + i];
      value += shared[(2 * w + 1) * part + i];
    }
    const long row = tile.first + i / 16;
    const int column = blockIdx.x * 16 + i % 16;
    store_inner<F>(inner_row<F>(p.inner, tile, row, p.T, p.I, p.Is), column, width, gate, value,
                   tile.always ? 1.f : p.gain_of[row], p.limit);
  }
}

// grid: 16 channels of the inner product in x, tiles in y.
template <Format F, int TOKENS>
DEVICE void up(const Up& p) {
  constexpr int NT = TOKENS / 8;
  const Tile tile = pick_tile(p.tiles, blockIdx.y, p.T, TOKENS);
  const int width = tile.always ? p.Is : p.I, row0 = blockIdx.x * 16;
  if (tile.count == 0 || row0 >= width) return;
  const bf16* rows[NT];
  token_rows<NT>(rows, tile.count, [&](int i) {
    return p.x + long(tile.always ? tile.first + i : p.token_of[tile.first + i]) * p.D;
  });
  float sums[2][NT][4] = {};
  if (F != ALWAYS<F> && tile.always) {
    up_sums<ALWAYS<F>, NT>(sums, p.s1, p.s3, 0, width, p.D, row0, rows);
  } else {
    const Matrices &w1 = tile.always ? p.s1 : p.w1, &w3 = tile.always ? p.s3 : p.w3;
    up_sums<F, NT>(sums, w1, w3, tile.expert, width, p.D, row0, rows);
  }
  store_up<F, NT>(p, tile, sums, width);
}

template <class Out>
struct Down {
  const bf16* inner;
  const int4* tiles;
  Matrices w2, s2;
  Out* routed;  // [rows, D]
  Out* shared;  // [T, D]
  int T, D, I, Is;
};

// Products with 16 rows of w2.
template <Format F, int NT, class Ready>
DEVICE void down_sums(float (&sums)[1][NT][4], const Matrices& w2, int expert, int D, int width, int row0,
                      const bf16* (&rows)[NT], Ready ready) {
  RowsLane<F> from[1];
  from[0].point(expert_weights(w2, expert, D, width), row0);
  constexpr int AHEAD = F == Format::BF16 || NT > 1 ? 1 : F == Format::FP8 ? 2 : 3;
  multiply_few<F, AHEAD, 1, NT>(sums, from, rows, 0, 1, width / 128, ready);
  if constexpr (F == Format::BF16) {
    for (int n = 0; n < NT; ++n) rows[n] += width;  // the second halves of the values
    multiply_few<F, AHEAD, 1, NT>(sums, from, rows, 0, 1, width / 128, [] {});
  }
}

// Round rows of inner products into shared memory: `count` rows of `width`, `stride` apart there.
DEVICE void round_rows(bf16* shared, const bf16* inner, int count, int width, int stride) {
  const int blocks = width / 128;
  round_blocks(
      long(count) * blocks, [&](long i) { return inner + i * 128; },
      [&](long i) { return shared + i / blocks * stride + i % blocks * 128; });
}

DEVICE void store_one(float* to, float value) { *to = value; }
DEVICE void store_one(bf16* to, float value) { *to = to_bf16(value); }

// grid: 128 channels of the output in x, tiles in y. Up to 8 rows of quantised forms are rounded here, in shared memory
// of 8 * (max(I, Is) + 32) bf16 (the padding keeps two rows from sharing banks); more are rounded before.
template <Format F, int TOKENS, class Out>
DEVICE void down(const Down<Out>& p) {
  constexpr int NT = TOKENS / 8;
  const Tile tile = pick_tile(p.tiles, blockIdx.y, p.T, TOKENS);
  if (tile.count == 0) return;
  const int width = tile.always ? p.Is : p.I, lane = threadIdx.x % 32;
  const int row0 = (blockIdx.x * DOWN_WARPS + threadIdx.x / 32) * 16;
  const bf16* inner = inner_row<F>(p.inner, tile, tile.first, p.T, p.I, p.Is);
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  const bf16* rows[NT] = {};
  const auto ready = [&] {
    if (F == Format::BF16 || TOKENS > 8) {
      token_rows<NT>(rows, tile.count, [&](int i) { return inner + long(i) * PARTS<F> * width; });
    } else {
      round_rows(shared, inner, tile.count, width, width + 32);
      __syncthreads();
      token_rows<NT>(rows, tile.count, [&](int i) { return shared + i * (width + 32); });
    }
  };
  float sums[1][NT][4] = {};
  if (F != ALWAYS<F> && tile.always) {
    down_sums<ALWAYS<F>, NT>(sums, p.s2, 0, p.D, width, row0, rows, ready);
  } else {
    down_sums<F, NT>(sums, tile.always ? p.s2 : p.w2, tile.expert, p.D, width, row0, rows, ready);
  }
  Out* out = tile.always ? p.shared : p.routed;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * n + lane % 4 * 2 + i % 2, row = row0 + lane / 4 + i / 2 * 8;
      if (token < tile.count) store_one(out + (tile.first + token) * long(p.D) + row, sums[0][n][i]);
    }
  }
}

#define V4_MOE_UP(name, format, tokens)                                                                                \
  V4_KERNEL(name, 128, tokens > 8 ? 2 : 4, const bf16* x, const int* token_of, const float* gain_of,                   \
            const int4* tiles, const void* w1, const void* w1_scale, const void* w3, const void* w3_scale,             \
            int w_bytes, const void* s1, const void* s1_scale, const void* s3, const void* s3_scale, int s_bytes,      \
            bf16* inner, int T, int D, int I, int Is, float limit) {                                   \
    up<Format::format, tokens>({x, token_of, gain_of, tiles, {w1, w1_scale, w_bytes}, {w3, w3_scale, w_bytes},      \
                                   {s1, s1_scale, s_bytes}, {s3, s3_scale, s_bytes}, inner, T, D, I, Is,       \
                                   limit});                                                                            \
  }

#define V4_MOE_DOWN(name, format, tokens, out)                                                                     \
  V4_KERNEL(name, 256, tokens > 8 ? 1 : 2, const bf16* inner, const int4* tiles,               \
            const void* w2, const void* w2_scale, int w_bytes, const void* s2, const void* s2_scale, int s_bytes,  \
            out* routed, out* shared, int T, int D, int I, int Is) {                                               \
    down<Format::format, tokens, out>(                                                                          \
        {inner, tiles, {w2, w2_scale, w_bytes}, {s2, s2_scale, s_bytes}, routed, shared, T, D, I, Is});    \
  }

V4_MOE_UP(v4_moe_fp4_up_8, FP4, 8)
V4_MOE_UP(v4_moe_fp4_up_32, FP4, 32)
V4_MOE_DOWN(v4_moe_fp4_down_8, FP4, 8, bf16)
V4_MOE_DOWN(v4_moe_fp4_down_32, FP4, 32, bf16)
V4_MOE_UP(v4_moe_fp8_up_8, FP8, 8)
V4_MOE_UP(v4_moe_fp8_up_32, FP8, 32)
V4_MOE_DOWN(v4_moe_fp8_down_8, FP8, 8, bf16)
V4_MOE_DOWN(v4_moe_fp8_down_32, FP8, 32, bf16)
V4_MOE_UP(v4_moe_float_up_8, BF16, 8)
V4_MOE_UP(v4_moe_float_up_32, BF16, 32)
V4_MOE_DOWN(v4_moe_float_down_8, BF16, 8, float)
V4_MOE_DOWN(v4_moe_float_down_32, BF16, 32, float)
