// Projections that read the same rows in one launch. At most 8 tokens whose prepared rows fit shared memory: each block
// takes rows of one of the weights, 16 for each team of warps. More than 32 tokens, prepared before: each block takes a
// tile of one of the weights, which are too small to keep a GPU busy one after the other. Between, the launches of
// linear.cu.
#include "linear.cuh"

struct Rows {
  const bf16* x;
  int T, K, split = WARPS;
  const bf16* norm = nullptr;
  float eps = 0.f;
};

struct Fp8 {
  const void *weight, *scale;
  bf16* y;
  int O;
};

template <class Out>
struct Plain {
  const bf16* weight;
  Out* y;
  int O;
};

// Multiply where the block falls into a weight's rows; return whether it did. `block` counts on from weight to weight.
template <Prepare PREPARE>
DEVICE bool take(const Rows& r, const Fp8& w, int scale_bytes, int& block) {
  const int rows = WARPS / r.split * 16, blocks = (w.O + rows - 1) / rows;
  if (block < blocks) {
    few_tokens<Format::FP8, 1, PREPARE, bf16>(
        {r.x, w.weight, w.scale, r.T, w.O, r.K, scale_bytes, 1, r.split, r.norm, r.eps}, w.y, block);
    return true;
  }
  block -= blocks;
  return false;
}

template <class Out>
DEVICE bool take(const Rows& r, const Plain<Out>& w, int& block) {
  const int blocks = (w.O + 15) / 16;
  if (block < blocks) {
    few_tokens<Format::BF16, 1, Prepare::NOTHING, Out>({r.x, w.weight, nullptr, r.T, w.O, r.K, 0, 1}, w.y, block);
    return true;
  }
  block -= blocks;
  return false;
}

#define V4_FP8_PAIR                                                                                              \
  const bf16* x, const void *w1, const void *w1_scale, bf16 *y1, int O1, const void *w2, const void *w2_scale,   \
      bf16 *y2, int O2

// Shared memory of all: T * (K + 32) bf16, with a norm (T + 1) * (K + 32), then 8 * 8 * 16 floats. grid: 16 rows of a
// weight, with a norm 128 / split.
V4_KERNEL(v4_project_window, 256, 2, V4_FP8_PAIR, int T, int K, int scale_bytes) {
  const Rows rows{x, T, K};
  int block = blockIdx.x;
  if (take<Prepare::ROUND>(rows, {w1, w1_scale, y1, O1}, scale_bytes, block)) return;
  take<Prepare::ROUND>(rows, {w2, w2_scale, y2, O2}, scale_bytes, block);
}

V4_KERNEL(v4_project_hca, 256, 2, V4_FP8_PAIR, const bf16* w3, float* y3, const bf16* w4, float* y4, int O3, int T,
          int K, int scale_bytes) {
  const Rows rows{x, T, K};
  int block = blockIdx.x;
  if (take<Prepare::ROUND>(rows, {w1, w1_scale, y1, O1}, scale_bytes, block)) return;
  if (take<Prepare::ROUND>(rows, {w2, w2_scale, y2, O2}, scale_bytes, block)) return;
  if (take(rows, Plain<float>{w3, y3, O3}, block)) return;
  take(rows, Plain<float>{w4, y4, O3}, block);
}

V4_KERNEL(v4_project_csa, 256, 2, V4_FP8_PAIR, const bf16* w3, float* y3, const bf16* w4, float* y4, int O3,
          const bf16* w5, float* y5, const bf16* w6, float* y6, int O5, const bf16* w7, bf16* y7, int O7, int T, int K,
          int scale_bytes) {
  const Rows rows{x, T, K};
  int block = blockIdx.x;
  if (take<Prepare::ROUND>(rows, {w1, w1_scale, y1, O1}, scale_bytes, block)) return;
  if (take<Prepare::ROUND>(rows, {w2, w2_scale, y2, O2}, scale_bytes, block)) return;
  if (take(rows, Plain<float>{w3, y3, O3}, block)) return;
  if (take(rows, Plain<float>{w4, y4, O3}, block)) return;
  if (take(rows, Plain<float>{w5, y5, O5}, block)) return;
  if (take(rows, Plain<float>{w6, y6, O5}, block)) return;
  take(rows, Plain<bf16>{w7, y7, O7}, block);
}

V4_KERNEL(v4_project_query, 256, 2, const bf16* x, const bf16* norm, const void* w1, const void* w1_scale, bf16* y1,
          int O1, int T, int K, int scale_bytes, int split, float eps) {
  int block = blockIdx.x;
  take<Prepare::NORM>({x, T, K, split, norm, eps}, {w1, w1_scale, y1, O1}, scale_bytes, block);
}

V4_KERNEL(v4_project_csa_query, 256, 2, const bf16* x, const bf16* norm, const void* w1, const void* w1_scale,
          bf16* y1, int O1, const void* w2, const void* w2_scale, bf16* y2, int O2, int T, int K, int scale_bytes,
          int split, float eps) {
  const Rows rows{x, T, K, split, norm, eps};
  int block = blockIdx.x;
  if (take<Prepare::NORM>(rows, {w1, w1_scale, y1, O1}, scale_bytes, block)) return;
  take<Prepare::NORM>(rows, {w2, w2_scale, y2, O2}, scale_bytes, block);
}

// Tiles of a product of many tokens with a weight of O rows.
DEVICE int tiles_of(int T, int O) { return (T + TILE_ROWS - 1) / TILE_ROWS * ((O + 255) / 256); }

// Many tokens. Shared memory: 2 * STAGE_BYTES. grid: tiles of a weight.
V4_KERNEL(v4_project_pair_many, 256, 1, V4_FP8_PAIR, int T, int K, int scale_bytes) {
  const int block = blockIdx.x, first = tiles_of(T, O1);
  if (block < first) {
    many_tokens<Format::FP8>({x, w1, w1_scale, T, O1, K, scale_bytes, 1}, y1, block);
  } else {
    many_tokens<Format::FP8>({x, w2, w2_scale, T, O2, K, scale_bytes, 1}, y2, block - first);
  }
}

// Go on to `next` where the block lies past the tiles of `w`.
DEVICE void pass(Plain<float>& w, const Plain<float>& next, int T, int& block) {
  const int tiles = tiles_of(T, w.O);
  if (block < tiles) return;
  block -= tiles;
  w = next;
}

V4_KERNEL(v4_project_hca_many, 256, 1, const bf16* x, const bf16* w3, float* y3, const bf16* w4, float* y4, int O3,
          int T, int K) {
  int block = blockIdx.x;
  Plain<float> w{w3, y3, O3};
  pass(w, {w4, y4, O3}, T, block);
  many_tokens<Format::BF16>({x, w.weight, nullptr, T, w.O, K, 0, 1}, w.y, block);
}

V4_KERNEL(v4_project_csa_many, 256, 1, const bf16* x, const bf16* w3, float* y3, const bf16* w4, float* y4, int O3,
          const bf16* w5, float* y5, const bf16* w6, float* y6, int O5, const bf16* w7, bf16* y7, int O7, int T, int K) {
  const int heads = tiles_of(T, O7);
  int block = blockIdx.x;
  if (block < heads) {
    many_tokens<Format::BF16>({x, w7, nullptr, T, O7, K, 0, 1}, y7, block);
    return;
  }
  block -= heads;
  const Plain<float> all[4] = {{w3, y3, O3}, {w4, y4, O3}, {w5, y5, O5}, {w6, y6, O5}};
  Plain<float> w = all[0];
#pragma unroll
  for (int i = 1; i < 4; ++i) pass(w, all[i], T, block);
  many_tokens<Format::BF16>({x, w.weight, nullptr, T, w.O, K, 0, 1}, w.y, block);
}
