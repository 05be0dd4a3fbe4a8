// The indexer: scores of the compressed entries for every query. Source: spec section 2.4. index_select.cu selects.
#include "rounding.cuh"

constexpr int WIDTH = 128;  // channels of an index key

// The rotation of a lane's channels 4 * lane .. 4 * lane + 3, the same for all heads of a token.
struct Turn {
  float c[2], s[2];
  bool turns;

  DEVICE Turn(const float* freqs, int position, int F) {
    const int turned = threadIdx.x % 32 * 4 - (WIDTH - 2 * F);
    turns = turned >= 0;
    for (int i = 0; i < 2; ++i) {
      const float angle = turns ? static_cast<float>(position) * freqs[turned / 2 + i] : 0.f;
      c[i] = cosf(angle);
      s[i] = sinf(angle);
    }
  }
};

// A query head as the scores take it, a warp holding it.
DEVICE uint2 prepared_head(uint2 raw, const Turn& turn, int quantise) {
  const float2 low = unpack_bf16(raw.x), high = unpack_bf16(raw.y);
  float v[4] = {low.x, low.y, high.x, high.y};
  if (turn.turns) {
    for (int i = 0; i < 2; ++i) rotate_by(v[2 * i], v[2 * i + 1], turn.c[i], turn.s[i]);
  }
  for (int i = 0; i < 4; ++i) v[i] = round_bf16(v[i]);
  if (quantise) {
    hadamard_128(v);
    for (int i = 0; i < 4; ++i) v[i] = round_bf16(v[i]);
    fake_fp4_128(v);
  }
  return make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

DEVICE uint2 load_head(const bf16* q, long row) {
  return *reinterpret_cast<const uint2*>(q + row * WIDTH + threadIdx.x % 32 * 4);
}

// q' = the query head as the scores take it, and gains = its weight; a warp takes one head of one token.
V4_KERNEL(v4_index_prepare, 128, 8, const bf16* q, const bf16* weights, const float* freqs, const int* start,
          bf16* prepared, float* gains, int rows, int S, int Hi, int F, int quantise, float scale) {
  const long row = long(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32, token = static_cast<int>(row / Hi);
  const Turn turn(freqs, start[token / S] + token % S, F);
  *reinterpret_cast<uint2*>(prepared + row * WIDTH + lane * 4) = prepared_head(load_head(q, row), turn, quantise);
  if (lane == 0) gains[row] = round_bf16(to_float(weights[row]) * scale);
}

constexpr int KEYS = 32;        // of a warp
constexpr int TILE_KEYS = 128;  // of a block of four warps
constexpr int PARTS = 4;        // 16-byte parts of a row that a lane loads: channels 8t + 32j, t = lane % 4

// Eight keys of a slot, a lane's parts; `first` may lie beyond the last.
DEVICE void load_keys(uint4 (&to)[PARTS], const bf16* keys, int first, int N) {
  const int lane = threadIdx.x % 32;
  const bf16* row = keys + long(min(first + lane / 4, N - 1)) * WIDTH + lane % 4 * 8;
#pragma unroll
  for (int j = 0; j < PARTS; ++j) to[j] = load16(row + 32 * j);
}

// score += gain * relu(head . key) for 16 heads, of which `count` are there, `stride` elements apart, and 8 * TILES
// keys. Both sides take channels in the same permuted order, so that a lane's share of a row is whole 16-byte parts.
template <int TILES>
DEVICE void add_heads(float (&score)[TILES][2], const bf16* heads, int stride, const float* gains,
                      const uint4 (&keys)[TILES][PARTS], int count) {
  const int lane = threadIdx.x % 32, row = lane / 4;
  float sum[TILES][4] = {};
#pragma unroll
  for (int j = 0; j < PARTS; ++j) {
    const bf16* from = heads + row * stride + lane % 4 * 8 + 32 * j;
    const uint4 a = row < count ? load16(from) : make_uint4(0, 0, 0, 0);
    const uint4 b = row + 8 < count ? load16(from + 8 * stride) : make_uint4(0, 0, 0, 0);
    const unsigned first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const unsigned low[2] = {keys[n][j].x, keys[n][j].y}, high[2] = {keys[n][j].z, keys[n][j].w};
      mma_bf16(sum[n], first, low);
      mma_bf16(sum[n], second, high);
    }
  }
  const float gain = row < count ? gains[row] : 0.f, other = row + 8 < count ? gains[row + 8] : 0.f;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    for (int i = 0; i < 2; ++i) score[n][i] += gain * fmaxf(sum[n][i], 0.f) + other * fmaxf(sum[n][i + 2], 0.f);
  }
}

// to[key] = the sums over a warp's heads, from key0 on, below N.
template <int TILES>
DEVICE void store_scores(float* to, const float (&score)[TILES][2], int key0, int N) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    for (int i = 0; i < 2; ++i) {
      float total = score[n][i];
      for (int offset = 4; offset < 32; offset <<= 1) total += __shfl_xor_sync(FULL, total, offset);
      const int key = key0 + n * 8 + lane % 4 * 2 + i;
      if (lane < 4 && key < N) to[key] = total;
    }
  }
}

// scores[token][key] = sum over heads of gain * relu(head . key), for up to `share` tokens of a slot and 128 keys.
// A tile of tokens is one slot's; this launch takes the tiles first_tile, first_tile + 1, ...
V4_KERNEL(v4_index_scores, 128, 3, const bf16* prepared, const float* gains, const bf16* keys, const int* start,
          float* scores, int S, int Hi, int N, int ratio, int share, int first_tile) {
  const int tile = blockIdx.y, tiles_per_slot = (S + share - 1) / share;
  const int slot = (tile + first_tile) / tiles_per_slot, first = (tile + first_tile) % tiles_per_slot * share;
  const int tokens = min(share, S - first);
  const int key0 = blockIdx.x * TILE_KEYS + threadIdx.x / 32 * KEYS;
  if (key0 >= min(N, (start[slot] + first + tokens) / ratio)) return;  // none of the tokens sees the warp's keys
  uint4 mine[KEYS / 8][PARTS];
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) load_keys(mine[n], keys + long(slot) * N * WIDTH, key0 + n * 8, N);
  for (int t = 0; t < tokens; ++t) {
    const long token = long(slot) * S + first + t;
    float score[KEYS / 8][2] = {};
    for (int head = 0; head < Hi; head += 16) {
      const long row = token * Hi + head;
      add_heads(score, prepared + row * WIDTH, WIDTH, gains + row, mine, Hi - head);
    }
    store_scores(scores + (long(tile) * share + t) * N, score, key0, N);
  }
}

constexpr int FEW_KEYS = 16;         // of a warp
constexpr int FEW_TILE = 128;        // of a block of eight warps
constexpr int STRIDE = WIDTH + 32;   // of a head in shared memory: eight lanes' parts lie in different banks

// Prepare all heads of a token in shared memory, [Hi][STRIDE], and then their gains; a warp takes every eighth.
DEVICE void prepare_heads(bf16* heads, float* gains, const bf16* q, const bf16* weights, const Turn& turn, int Hi,
                          int quantise, float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int head = threadIdx.x / 32; head < Hi; head += 8) {
    *reinterpret_cast<uint2*>(heads + head * STRIDE + lane * 4) = prepared_head(load_head(q, head), turn, quantise);
  }
  for (int head = threadIdx.x; head < Hi; head += blockDim.x) gains[head] = round_bf16(to_float(weights[head]) * scale);
}

// Few tokens: the scores of one with the block's share of the keys, heads prepared in the block while the first keys
// are on their way. `counts` are `zeros` words of the token, a multiple of four, that the selection will add to.
// Shared memory: Hi * (STRIDE bf16 and a float).
V4_KERNEL(v4_index_scores_few, 256, 2, const bf16* q, const bf16* weights, const bf16* keys, const float* freqs,
          const int* start, float* scores, unsigned* counts, int S, int Hi, int N, int F, int ratio, int quantise,
          int zeros, float scale) {
  bf16* heads = reinterpret_cast<bf16*>(shared_memory());
  float* gains = reinterpret_cast<float*>(heads + Hi * STRIDE);
  const long token = blockIdx.y, slot = token / S;
  const int position = start[slot] + static_cast<int>(token % S), n = min(N, (position + 1) / ratio);
  for (int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4; i < zeros; i += gridDim.x * blockDim.x * 4) {
    store16(counts + token * zeros + i, make_uint4(0, 0, 0, 0));
  }
  const bf16* mine = keys + slot * N * WIDTH;
  int key0 = blockIdx.x * FEW_TILE + threadIdx.x / 32 * FEW_KEYS;
  if (int(blockIdx.x) * FEW_TILE >= n) return;
  uint4 tile[FEW_KEYS / 8][PARTS], next[FEW_KEYS / 8][PARTS];
#pragma unroll
  for (int i = 0; i < FEW_KEYS / 8; ++i) load_keys(tile[i], mine, key0 + i * 8, N);
  prepare_heads(heads, gains, q + token * Hi * WIDTH, weights + token * Hi, Turn(freqs, position, F), Hi, quantise,
                scale);
  __syncthreads();
  for (; key0 < n; key0 += gridDim.x * FEW_TILE) {
#pragma unroll
    for (int i = 0; i < FEW_KEYS / 8; ++i) load_keys(next[i], mine, key0 + gridDim.x * FEW_TILE + i * 8, N);
    float score[FEW_KEYS / 8][2] = {};
    for (int head = 0; head < Hi; head += 16) {
      add_heads(score, heads + head * STRIDE, STRIDE, gains + head, tile, Hi - head);
    }
    store_scores(scores + token * N, score, key0, N);
#pragma unroll
    for (int i = 0; i < FEW_KEYS / 8; ++i) {
#pragma unroll
      for (int j = 0; j < PARTS; ++j) tile[i][j] = next[i][j];
    }
  }
}
