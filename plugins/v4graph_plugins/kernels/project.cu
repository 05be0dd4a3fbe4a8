// Projections that read the same rows in one launch, for at most 8 tokens whose prepared rows fit shared memory: each
// block takes rows of one of the weights, 16 for each team of warps. More tokens take the launches of linear.cu one
// after the other.
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
