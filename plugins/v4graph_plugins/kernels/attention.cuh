// Attention of one query token and HM heads over its keys, which are its values: one 512-wide row each.
//
// A block has 8 warps; warp w owns channels 64w .. 64w+63, of the products q k (summed over the warps through shared
// memory) and of the output. So a block reads every key once, and the warp's share of q stays in registers.
// Keys come in tiles of 32, copied to shared memory one tile ahead. Source: spec sections 2.2, 2.4, 2.5.
#pragma once
#include "attention_keys.cuh"

constexpr int LISTS = 4;  // tiles whose rows are listed

// Shared memory, in this order. Rows of keys and of P are stored with their 16-byte parts permuted, so that the eight
// rows that ldmatrix reads at once lie in different banks.
template <int HM>
struct Shared {
  bf16* tiles;     // [STAGES][TILE][HEAD]
  float* partial;  // [8 warps][HM][TILE]
  bf16* p;         // [HM][TILE]
  float* factor;   // [HM]
  int* keys;       // [LISTS][TILE]
  float2* turns;   // [ROTATED / 2]

  DEVICE explicit Shared(unsigned char* base) {
    tiles = reinterpret_cast<bf16*>(base);
    partial = reinterpret_cast<float*>(tiles + STAGES * TILE * HEAD);
    p = reinterpret_cast<bf16*>(partial + 8 * HM * TILE);
    factor = reinterpret_cast<float*>(p + HM * TILE);
    keys = reinterpret_cast<int*>(factor + HM);
    turns = reinterpret_cast<float2*>(keys + LISTS * TILE);
  }
  DEVICE bf16* key_part(int stage, int key, int part) const {
    return tiles + (stage * TILE + key) * HEAD + (part ^ (key & 7)) * 8;
  }
  DEVICE bf16* p_part(int head, int part) const { return p + head * TILE + (part ^ (head >> 1 & 3)) * 8; }
  DEVICE float* score(int warp, int head, int key) const {
    return partial + (warp * HM + head) * TILE + (key ^ (head & 3) << 3);
  }
};

DEVICE void list_tile(int* keys, const KeyList& list, int tile, int begin, int end) {
  const int j = begin + tile * TILE + threadIdx.x % 32;
  keys[tile % LISTS * TILE + threadIdx.x % 32] = j < end ? list.key(j) : -1;
}

template <int HM>
DEVICE void copy_tile(const Shared<HM>& shared, const KeyList& list, int tile) {
  const int part = threadIdx.x % 64;
#pragma unroll 2
  for (int r = threadIdx.x / 64; r < TILE; r += THREADS / 64) {
    const int key = shared.keys[tile % LISTS * TILE + r];
    const bf16* row = list.row(key < 0 ? 0 : key);
    cp_async16(shared.key_part(tile % STAGES, r, part), row + part * 8, key >= 0);
  }
  cp_async_commit();
}

// What a warp holds of q: its 64 channels of HM heads, as operands of mma. Heads past H are zeros.
template <int HM>
struct Queries {
  unsigned part[HM / 16][4][4];

  DEVICE Queries(const bf16* q, int heads) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 64 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < HM / 16; ++m) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int head = m * 16 + lane / 4 + i % 2 * 8, channel = first + k * 16 + i / 2 * 8;
          part[m][k][i] = head < heads ? *reinterpret_cast<const unsigned*>(q + long(head) * HEAD + channel) : 0u;
        }
      }
    }
  }
};

// Products of all heads with the tile's keys over the warp's channels.
template <int HM>
DEVICE void score_tile(const Shared<HM>& shared, const Queries<HM>& q, int stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int keys = 0; keys < TILE; keys += 16) {
    float sum[HM / 16][2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      unsigned r[4];
      ldmatrix_x4(r, shared.key_part(stage, keys + lane / 16 * 8 + lane % 8, warp * 8 + k * 2 + lane / 8 % 2));
      const unsigned low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < HM / 16; ++m) {
        mma_bf16(sum[m][0], q.part[m][k], low);
        mma_bf16(sum[m][1], q.part[m][k], high);
      }
    }
#pragma unroll
    for (int m = 0; m < HM / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = sum[m][i / 2] + i % 2 * 2;
        float* to = shared.score(warp, m * 16 + lane / 4 + i % 2 * 8, keys + i / 2 * 8 + lane % 4 * 2);
        *reinterpret_cast<float2*>(to) = make_float2(pair[0], pair[1]);
      }
    }
  }
}

// Running softmax of one head (in powers of two), the same in the THREADS / HM neighbouring threads that share it.
struct Running {
  float peak = NONE, total = 0.f;
};

// Add up the warps' products, and turn them into p = 2^(score - peak), in bf16, for the tile.
template <int HM>
DEVICE void softmax_tile(const Shared<HM>& shared, Running& running, int tile, float scale) {
  constexpr int SHARE = THREADS / HM, COLUMNS = TILE / SHARE;
  const int head = threadIdx.x / SHARE, column = threadIdx.x % SHARE * COLUMNS;
  float score[COLUMNS] = {}, peak = running.peak;
#pragma unroll
  for (int warp = 0; warp < 8; ++warp) {
    const float* from = shared.score(warp, head, column);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) score[i] += from[i];
  }
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    score[i] = shared.keys[tile % LISTS * TILE + column + i] < 0 ? NONE : score[i] * scale;
    peak = fmaxf(peak, score[i]);
  }
#pragma unroll
  for (int offset = SHARE / 2; offset; offset >>= 1) peak = fmaxf(peak, __shfl_xor_sync(FULL, peak, offset));
  const float base = peak == NONE ? 0.f : peak, factor = exp2f(running.peak - base);
  float sum = 0.f;
  bf16* to = shared.p_part(head, column / 8) + column % 8;
#pragma unroll
  for (int i = 0; i < COLUMNS; i += 2) {
    const float a = exp2f(score[i] - base), b = exp2f(score[i + 1] - base);
    sum += a + b;
    *reinterpret_cast<unsigned*>(to + i) = pack_bf16(a, b);
  }
#pragma unroll
  for (int offset = SHARE / 2; offset; offset >>= 1) sum += __shfl_xor_sync(FULL, sum, offset);
  running.total = running.total * factor + sum;
  running.peak = peak;
  if (column == 0) shared.factor[head] = factor;
}

// The warp's 64 channels of the output, unnormalised: [HM / 16][8 channels each][fragment].
template <int HM>
struct Output {
  float sum[HM / 16][8][4];
};

template <int HM>
DEVICE void value_tile(const Shared<HM>& shared, Output<HM>& out, int stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < HM / 16; ++m) {
    const float low = shared.factor[m * 16 + lane / 4], high = shared.factor[m * 16 + lane / 4 + 8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      out.sum[m][n][0] *= low, out.sum[m][n][1] *= low;
      out.sum[m][n][2] *= high, out.sum[m][n][3] *= high;
    }
  }
#pragma unroll
  for (int k = 0; k < TILE / 16; ++k) {
    unsigned p[HM / 16][4];
#pragma unroll
    for (int m = 0; m < HM / 16; ++m) ldmatrix_x4(p[m], shared.p_part(m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      unsigned r[4];
      ldmatrix_x4_trans(r, shared.key_part(stage, k * 16 + lane % 16, warp * 8 + n + lane / 16));
      const unsigned low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < HM / 16; ++m) {
        mma_bf16(out.sum[m][n], p[m], low);
        mma_bf16(out.sum[m][n + 1], p[m], high);
      }
    }
  }
}

// Attend the keys begin .. end-1 of a list.
template <int HM>
DEVICE void attend(const Shared<HM>& shared, const KeyList& list, const Queries<HM>& q, int begin, int end, float scale,
                   Output<HM>& out, Running& running) {
  const int warp = threadIdx.x / 32, tiles = (end - begin + TILE - 1) / TILE;
  if (warp < 2) list_tile(shared.keys, list, warp, begin, end);
  __syncthreads();
  if (tiles) copy_tile(shared, list, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before it any more
    if (tile + 1 < tiles) copy_tile(shared, list, tile + 1);
    if (warp == tile % 8) list_tile(shared.keys, list, tile + 2, begin, end);
    score_tile(shared, q, tile % STAGES);
    __syncthreads();
    softmax_tile(shared, running, tile, scale);
    __syncthreads();
    value_tile(shared, out, tile % STAGES);
  }
}
