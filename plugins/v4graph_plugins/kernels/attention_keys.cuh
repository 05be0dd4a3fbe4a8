// What the attention kernels share: where a query's keys lie, and how an output is finished. Source: spec sections 2.2,
// 2.4, 2.5.
#pragma once
#include "rounding.cuh"

constexpr int HEAD = 512;
constexpr int ROTATED = 64;
constexpr int TILE = 32;      // keys of a tile
constexpr int STAGES = 2;     // tiles in shared memory
constexpr int THREADS = 256;
constexpr float NONE = -INFINITY;

// Where the keys of a chunk lie. `cache` and `rows` may be null; without rows every closed entry is a key.
struct Keys {
  const bf16 *kv, *ring, *cache;
  const int *rows;
  int S, L, N, K, window, ratio;
};

// The keys of one query: the window's positions from `first` on, then cache entries.
struct Span {
  int batch, token, start, first, near, count;
};

// The same, in order.
struct KeyList : Span {
  const Keys& from;

  DEVICE KeyList(const Keys& keys, const Span& span) : Span(span), from(keys) {}
  DEVICE KeyList(const Keys& keys, int token, int start) : Span{token / keys.S, token, start, 0, 0, 0}, from(keys) {
    const int position = start + token % keys.S;
    first = max(0, position - keys.window + 1);
    near = position - first + 1;
    const int far = keys.rows ? keys.K : keys.cache ? min(keys.N, (position + 1) / keys.ratio) : 0;
    count = near + far;
  }

  // A key as one number: -1 for none, else 4 * row + {0: chunk, 1: ring, 2: cache}.
  DEVICE int key(int j) const {
    if (j >= count) return -1;
    if (j < near) {
      const int position = first + j;
      return position >= start ? 4 * (position - start) : 4 * (position % from.L) + 1;
    }
    if (!from.rows) return 4 * (j - near) + 2;
    const int row = from.rows[long(token) * from.K + j - near];
    return row < 0 ? -1 : 4 * row + 2;
  }

  DEVICE const bf16* row(int key) const {
    const long index = key / 4;
    if (key % 4 == 0) return from.kv + (long(batch) * from.S + index) * HEAD;
    return key % 4 == 1 ? from.ring + (long(batch) * from.L + index) * HEAD
                        : from.cache + (long(batch) * from.N + index) * HEAD;
  }
};

// The tensors of a call that are not keys.
struct Call {
  const bf16* q;
  const float *sink, *freqs;
  const int *start, *num;
  bf16 *o, *ring_out;
  float* partial;  // [token][split][head][HEAD + 2]: sums, then peak and total
  int H, write_ring;
  float scale;
};

// Cosine and sine that turn a pair of channels back.
DEVICE float2 turn_of(float frequency, int position) {
  const float angle = static_cast<float>(position) * frequency;
  return make_float2(cosf(angle), -sinf(angle));
}

// A warp, those of a token's last 64 channels: once for all heads, since cosf of a large angle is slow.
DEVICE void write_turns(float2* turns, const float* freqs, int position) {
  turns[threadIdx.x % 32] = turn_of(freqs[threadIdx.x % 32], position);
}

// Two neighbouring channels of an output: rounded, rotated back, and rounded again.
DEVICE unsigned turned_pair(float even, float odd, float2 turn) {
  even = round_bf16(even);
  odd = round_bf16(odd);
  rotate_by(even, odd, turn.x, turn.y);
  return pack_bf16(even, odd);
}

DEVICE unsigned finished_pair(float even, float odd, int channel, const float2* turns) {
  const int turned = (channel - (HEAD - ROTATED)) / 2;
  return turned < 0 ? pack_bf16(even, odd) : turned_pair(even, odd, turns[turned]);
}

// The block's position becomes the newest of its row of the ring. A chunk of S <= L - window tokens overwrites
// positions up to start + S - 1 - L <= start - window - 1, and no query of the chunk sees one below start - window + 1.
DEVICE void write_ring_row(const Call& call, const Keys& keys, long token) {
  const long batch = token / keys.S;
  const int s = static_cast<int>(token % keys.S), part = threadIdx.x * 8;
  if (s >= call.num[batch] || part >= HEAD) return;
  const int row = (call.start[batch] + s) % keys.L;
  store16(call.ring_out + (batch * keys.L + row) * HEAD + part, load16(keys.kv + token * HEAD + part));
}

#define V4_COMMA ,
#define V4_CACHE const bf16 *cache,
#define V4_CACHE_AND_ROWS const bf16 *cache, const int *rows,
