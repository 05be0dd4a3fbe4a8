// The experts where each has many rows (prefill): a matrix is read and decoded once for 64 rows in shared memory.
// Source: spec section 3.
#include "moe_experts.cuh"
#include "tiles.cuh"

constexpr int STAGE_STRIDE = 132;  // floats of 128 staged channels, padded so that a warp's fragment hits all banks

// Float fragments of 128 channels to shared memory [64][STAGE_STRIDE], `value(n, i)` each; 16 channels per warp.
template <class Value>
DEVICE void stage(Value value) {
  float* staged = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * n + lane % 4 * 2 + i % 2, channel = warp * 16 + lane / 4 + i / 2 * 8;
      staged[token * STAGE_STRIDE + channel] = value(n, i);
    }
  }
  __syncthreads();
}

// Eight staged channels of one row, for each of `count` rows: row(i, channel, values). Half a warp has a row; all lanes
// come to every call, rows past the last with `there` false.
template <class Row>
DEVICE void unstage(int count, Row row) {
  const float* staged = reinterpret_cast<const float*>(shared_memory());
  const int channel = threadIdx.x % 16 * 8;
  for (int first = 0; first < TILE_ROWS; first += 16) {
    const int i = first + threadIdx.x / 16;
    Floats8 values;
    for (int j = 0; j < 8; ++j) values.v[j] = staged[i * STAGE_STRIDE + channel + j];
    row(i, channel, values, i < count);
  }
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

template <Format F>
DEVICE void up_sums(float (&sums)[2][8][4], const Matrices& w1, const Matrices& w3, int expert, int width, int D,
                    const bf16* row) {
  const int row0 = blockIdx.x * 128 + threadIdx.x / 32 * 16;
  RowsLane<F> from[2];
  from[0].point(expert_weights(w1, expert, width, D), row0);
  from[1].point(expert_weights(w3, expert, width, D), row0);
  multiply_tile<F>(sums, from, row, D / 128);
}

// Activations of a tile and 128 channels: quantised forms round to bf16 where the reference does and then to FP8 for
// the down projection, whose blocks of 128 these are.
template <Format F>
DEVICE void store_up(const Up& p, const Tile& tile, const float (&sums)[2][8][4], int width) {
  stage([&](int n, int i) { return swiglu(round_as<F>(sums[0][n][i]), round_as<F>(sums[1][n][i]), 1.f, p.limit); });
  unstage(tile.count, [&](int i, int channel, Floats8 values, bool there) {
    const float gain = tile.always || !there ? 1.f : p.gain_of[tile.first + i];
    for (int j = 0; j < 8; ++j) values.v[j] *= gain;
    bf16* to = inner_row<F>(p.inner, tile, tile.first + i, p.T, p.I, p.Is) + blockIdx.x * 128 + channel;
    const uint4 high = pack8(values);
    if (F == Format::BF16) {
      Floats8 rest = unpack8(high);
      for (int j = 0; j < 8; ++j) rest.v[j] = values.v[j] - rest.v[j];
      if (there) store16(to, high);
      if (there) store16(to + width, pack8(rest));
    } else {
      const uint4 rounded = round_eight(high);
      if (there) store16(to, rounded);
    }
  });
}

// grid: 128 channels of the inner product in x, tiles in y.
template <Format F>
DEVICE void up(const Up& p) {
  const Tile tile = pick_tile(p.tiles, blockIdx.y, p.T, TILE_ROWS);
  const int width = tile.always ? p.Is : p.I;
  if (tile.count == 0 || int(blockIdx.x) * 128 >= width) return;
  const int number = tile.first + min(int(threadIdx.x) / 4, tile.count - 1);  // the last again past it
  const bf16* row = p.x + long(tile.always ? number : p.token_of[number]) * p.D;
  float sums[2][8][4] = {};
  if (F != ALWAYS<F> && tile.always) {
    up_sums<ALWAYS<F>>(sums, p.s1, p.s3, 0, width, p.D, row);
  } else {
    const Matrices &w1 = tile.always ? p.s1 : p.w1, &w3 = tile.always ? p.s3 : p.w3;
    up_sums<F>(sums, w1, w3, tile.expert, width, p.D, row);
  }
  store_up<F>(p, tile, sums, width);
}

template <class Out>
struct Down {
  const bf16* inner;  // rounded in quantised forms
  const int4* tiles;
  Matrices w2, s2;
  Out* routed;  // [rows, D]
  Out* shared;  // [T, D]
  int T, D, I, Is;
};

template <Format F>
DEVICE void down_sums(float (&sums)[2][8][4], const Matrices& w2, int expert, int D, int width,
                      const bf16* row) {
  const int row0 = blockIdx.x * 256 + threadIdx.x / 32 * 16;
  RowsLane<F> from[2];
  from[0].point(expert_weights(w2, expert, D, width), row0);
  from[1].point(expert_weights(w2, expert, D, width), row0 + 128);
  multiply_tile<F>(sums, from, row, width / 128);
  if constexpr (F == Format::BF16) multiply_tile<F>(sums, from, row + width, width / 128);  // the second halves
}

DEVICE void store8(bf16* to, const Floats8& values) { store16(to, pack8(values)); }
DEVICE void store8(float* to, const Floats8& values) {
  for (int half = 0; half < 2; ++half) {
    const float* v = values.v + 4 * half;
    *reinterpret_cast<float4*>(to + 4 * half) = make_float4(v[0], v[1], v[2], v[3]);
  }
}

// grid: 256 channels of the output in x, tiles in y.
template <Format F, class Out>
DEVICE void down(const Down<Out>& p) {
  const Tile tile = pick_tile(p.tiles, blockIdx.y, p.T, TILE_ROWS);
  if (tile.count == 0) return;
  const int width = tile.always ? p.Is : p.I;
  const int number = tile.first + min(int(threadIdx.x) / 4, tile.count - 1);
  const bf16* row = inner_row<F>(p.inner, tile, number, p.T, p.I, p.Is);
  float sums[2][8][4] = {};
  if (F != ALWAYS<F> && tile.always) {
    down_sums<ALWAYS<F>>(sums, p.s2, 0, p.D, width, row);
  } else {
    down_sums<F>(sums, tile.always ? p.s2 : p.w2, tile.expert, p.D, width, row);
  }
  Out* out = tile.always ? p.shared : p.routed;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int column = blockIdx.x * 256 + m * 128;
    if (column >= p.D) break;
    stage([&](int n, int i) { return sums[m][n][i]; });
    unstage(tile.count, [&](int i, int channel, const Floats8& values, bool there) {
      if (there) store8(out + (tile.first + i) * long(p.D) + column + channel, values);
    });
    __syncthreads();
  }
}

#define V4_MOE_UP(name, format)                                                                                       \
  V4_KERNEL(name, 256, 1, const bf16* x, const int* token_of, const float* gain_of, const int4* tiles,                \
            const void* w1, const void* w1_scale, const void* w3, const void* w3_scale, int w_bytes, const void* s1,  \
            const void* s1_scale, const void* s3, const void* s3_scale, int s_bytes, bf16* inner, int T, int D,       \
            int I, int Is, float limit) {                                                                             \
    up<Format::format>({x, token_of, gain_of, tiles, {w1, w1_scale, w_bytes}, {w3, w3_scale, w_bytes},             \
                           {s1, s1_scale, s_bytes}, {s3, s3_scale, s_bytes}, inner, T, D, I, Is, limit});             \
  }

#define V4_MOE_DOWN(name, format, out)                                                                             \
  V4_KERNEL(name, 256, 1, const bf16* inner, const int4* tiles, const void* w2, const void* w2_scale, int w_bytes, \
            const void* s2, const void* s2_scale, int s_bytes, out* routed, out* shared, int T, int D, int I,      \
            int Is) {                                                                                              \
    down<Format::format, out>(                                                                                  \
        {inner, tiles, {w2, w2_scale, w_bytes}, {s2, s2_scale, s_bytes}, routed, shared, T, D, I, Is});            \
  }

V4_MOE_UP(v4_moe_fp4_up_64, FP4)
V4_MOE_DOWN(v4_moe_fp4_down_64, FP4, bf16)
V4_MOE_UP(v4_moe_fp8_up_64, FP8)
V4_MOE_DOWN(v4_moe_fp8_down_64, FP8, bf16)
V4_MOE_UP(v4_moe_float_up_64, BF16)
V4_MOE_DOWN(v4_moe_float_down_64, BF16, float)
