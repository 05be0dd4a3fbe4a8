// The indexer: scores of the compressed entries for every query. Source: spec section 2.4. index_select.cu selects.
#include "rounding.cuh"

constexpr int WIDTH = 128;  // channels of an index key

// q' = the query head as the scores take it, and gains = its weight; a warp takes one head of one token. `counts` are
// `zeros` words, a multiple of four, that a selection spread over blocks adds to: none runs here yet.
V4_KERNEL(v4_index_prepare, 128, 8, const bf16* q, const bf16* weights, const float* freqs, const int* start,
          bf16* prepared, float* gains, unsigned* counts, int rows, int S, int Hi, int F, int quantise, int zeros,
          float scale) {
  for (int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4; i < zeros; i += gridDim.x * blockDim.x * 4) {
    store16(counts + i, make_uint4(0, 0, 0, 0));
  }
  const long row = long(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32, token = static_cast<int>(row / Hi);
  const uint2 raw = *reinterpret_cast<const uint2*>(q + row * WIDTH + lane * 4);
  const float2 low = unpack_bf16(raw.x), high = unpack_bf16(raw.y);
  float v[4] = {low.x, low.y, high.x, high.y};
  const int turned = lane * 4 - (WIDTH - 2 * F);
  if (turned >= 0) {
    const int position = start[token / S] + token % S;
    for (int i = 0; i < 4; i += 2) rotate(v[i], v[i + 1], position, freqs[(turned + i) / 2]);
  }
  for (int i = 0; i < 4; ++i) v[i] = round_bf16(v[i]);
  if (quantise) {
    hadamard_128(v);
    for (int i = 0; i < 4; ++i) v[i] = round_bf16(v[i]);
    fake_fp4_128(v);
  }
  bf16* to = prepared + row * WIDTH + lane * 4;
  *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
  if (lane == 0) gains[row] = round_bf16(to_float(weights[row]) * scale);
}

constexpr int KEYS = 32;        // of a warp
constexpr int TILE_KEYS = 128;  // of a block of four warps
constexpr int PARTS = 4;        // 16-byte parts of a row that a lane loads: channels 8t + 32j, t = lane % 4

// Products of 16 heads with the warp's keys. Both sides take channels in the same permuted order, so that a lane's
// share of a row is whole 16-byte parts and nothing goes through shared memory.
DEVICE void multiply_heads(float (&sum)[KEYS / 8][4], const bf16* heads, const uint4 (&keys)[KEYS / 8][PARTS],
                           int count) {
  const int lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll
  for (int j = 0; j < PARTS; ++j) {
    const bf16* from = heads + row * WIDTH + lane % 4 * 8 + 32 * j;
    const uint4 a = row < count ? load16(from) : make_uint4(0, 0, 0, 0);
    const uint4 b = row + 8 < count ? load16(from + 8 * WIDTH) : make_uint4(0, 0, 0, 0);
    const unsigned first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      const unsigned low[2] = {keys[n][j].x, keys[n][j].y}, high[2] = {keys[n][j].z, keys[n][j].w};
      mma_bf16(sum[n], first, low);
      mma_bf16(sum[n], second, high);
    }
  }
}

// scores[token][key] = sum over heads of gain * relu(head . key), for up to `share` tokens of a slot and 128 keys.
// A tile of tokens is one slot's; this launch takes the tiles first_tile, first_tile + 1, ...
V4_KERNEL(v4_index_scores, 128, 3, const bf16* prepared, const float* gains, const bf16* keys, const int* start,
          float* scores, int S, int Hi, int N, int ratio, int share, int first_tile) {
  const int tile = blockIdx.y, tiles_per_slot = (S + share - 1) / share;
  const int slot = (tile + first_tile) / tiles_per_slot, first = (tile + first_tile) % tiles_per_slot * share;
  const int tokens = min(share, S - first), lane = threadIdx.x % 32;
  const int key0 = blockIdx.x * TILE_KEYS + threadIdx.x / 32 * KEYS;
  if (key0 >= min(N, (start[slot] + first + tokens) / ratio)) return;  // none of the tokens sees the warp's keys
  uint4 mine[KEYS / 8][PARTS];
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
    const long key = min(key0 + n * 8 + lane / 4, N - 1);
    const bf16* row = keys + (long(slot) * N + key) * WIDTH + lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < PARTS; ++j) mine[n][j] = load16(row + 32 * j);
  }
  for (int t = 0; t < tokens; ++t) {
    const long token = long(slot) * S + first + t;
    float score[KEYS / 8][2] = {};
    for (int head = 0; head < Hi; head += 16) {
      float sum[KEYS / 8][4] = {};
      multiply_heads(sum, prepared + (token * Hi + head) * WIDTH, mine, Hi - head);
      const int low = head + lane / 4, high = low + 8;
      const float gain = low < Hi ? gains[token * Hi + low] : 0.f;
      const float other = high < Hi ? gains[token * Hi + high] : 0.f;
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
        for (int i = 0; i < 2; ++i) score[n][i] += gain * fmaxf(sum[n][i], 0.f) + other * fmaxf(sum[n][i + 2], 0.f);
      }
    }
    float* to = scores + (long(tile) * share + t) * N;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      for (int i = 0; i < 2; ++i) {
        float total = score[n][i];
        for (int offset = 4; offset < 32; offset <<= 1) total += __shfl_xor_sync(FULL, total, offset);
        const int key = key0 + n * 8 + lane % 4 * 2 + i;
        if (lane < 4 && key < N) to[key] = total;
      }
    }
  }
}
