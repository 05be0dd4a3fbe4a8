// The indexer: scores of the compressed entries for every query, and the exact top-k. Source: spec section 2.4.
#include "rounding.cuh"

constexpr int WIDTH = 128;  // channels of an index key

// q' = the query head as the scores take it, and gains = its weight; a warp takes one head of one token.
V4_KERNEL(v4_index_prepare, 128, 8, const bf16* q, const bf16* weights, const float* freqs, const int* start,
          bf16* prepared, float* gains, int rows, int S, int Hi, int F, int quantise, float scale) {
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

constexpr int THREADS = 512;
constexpr int BINS = 2048;
constexpr int MOST_SELECTED = 1024;

// Bits that order like the value; both zeros are one.
DEVICE unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Shared memory of a selection: the histogram, what was collected, and a few words.
struct Selection {
  unsigned* bins;             // [BINS]
  unsigned long long* found;  // [MOST_SELECTED]: ordered score, then the complement of the index
  int* words;                 // [32 + 4]

  DEVICE explicit Selection(unsigned char* base) {
    found = reinterpret_cast<unsigned long long*>(base);
    bins = reinterpret_cast<unsigned*>(found + MOST_SELECTED);
    words = reinterpret_cast<int*>(bins + BINS);
  }
};

// Sum of `value` over the threads before this one.
DEVICE int sum_before(int value, int* words) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int by = 1; by < 32; by <<= 1) {
    const int below = __shfl_up_sync(FULL, sum, by);
    if (lane >= by) sum += below;
  }
  __syncthreads();
  if (lane == 31) words[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += words[w];
  return sum - value;
}

// The bin in which the `wanted`-th value from the top lies; words[32] becomes it, words[33] how many lie above it.
DEVICE void find_bin(const Selection& s, int wanted) {
  constexpr int EACH = BINS / THREADS;
  int count = 0;
  for (int i = 0; i < EACH; ++i) count += s.bins[BINS - 1 - (threadIdx.x * EACH + i)];
  int above = sum_before(count, s.words);
  for (int i = 0; i < EACH; ++i) {
    const int bin = BINS - 1 - (threadIdx.x * EACH + i), here = s.bins[bin];
    if (above < wanted && wanted <= above + here) {
      s.words[32] = bin;
      s.words[33] = above;
    }
    above += here;
  }
  __syncthreads();
}

// The wanted-th largest of n scores as ordered bits; `wanted` becomes how many of those equal to it belong to the
// selection. Three passes over the scores: 11, 11 and 10 bits.
DEVICE unsigned radix_select(const Selection& s, const float* scores, int n, int& wanted) {
  unsigned prefix = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const unsigned digits = pass == 2 ? 1023u : 2047u;
    const int known = pass == 2 ? 10 : shift + 11;  // bits below the prefix; 32 in the first pass
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
      const unsigned key = ordered(scores[i]);
      if (pass == 0 || key >> known == prefix >> known) atomicAdd(&s.bins[key >> shift & digits], 1u);
    }
    __syncthreads();
    find_bin(s, wanted);
    prefix |= static_cast<unsigned>(s.words[32]) << shift;
    wanted -= s.words[33];
    __syncthreads();
  }
  return prefix;
}

DEVICE unsigned long long packed(unsigned key, int index) {
  return static_cast<unsigned long long>(key) << 32 | static_cast<unsigned>(~index);
}

// Collect the scores above `threshold` in any order, and the first `equal` that equal it.
DEVICE void collect(const Selection& s, const float* scores, int n, unsigned threshold, int equal, int k) {
  if (threadIdx.x == 0) s.words[34] = 0;
  __syncthreads();
  int taken = 0;  // equals before this stretch
  for (int base = 0; base < n; base += THREADS) {
    const int i = base + threadIdx.x;
    const unsigned key = i < n ? ordered(scores[i]) : 0u;
    const bool above = i < n && key > threshold, same = i < n && key == threshold;
    if (above) s.found[atomicAdd(&s.words[34], 1)] = packed(key, i);
    if (taken < equal) {
      const int rank = taken + sum_before(same, s.words);
      if (same && rank < equal) s.found[k - equal + rank] = packed(key, i);
      if (threadIdx.x == THREADS - 1) s.words[35] = rank + same;
      __syncthreads();
      taken = s.words[35];
    }
  }
  __syncthreads();
}

// Largest first; `size` is a power of two, unused places hold 0.
DEVICE void sort_found(const Selection& s, int size) {
  for (int run = 2; run <= size; run <<= 1) {
    for (int step = run / 2; step; step >>= 1) {
      for (int i = threadIdx.x; i < size / 2; i += THREADS) {
        const int low = i / step * 2 * step + i % step, high = low + step;
        const bool descending = (low & run) == 0;
        const unsigned long long a = s.found[low], b = s.found[high];
        if ((a < b) == descending) s.found[low] = b, s.found[high] = a;
      }
      __syncthreads();
    }
  }
}

// rows[token] = the topk best of the entries that the token sees, best first, ties to the lowest index, then -1.
V4_KERNEL(v4_index_select, 512, 2, const float* scores, const int* start, int* rows, int S, int N, int ratio, int topk,
          int share, int first_tile) {
  const int tiles_per_slot = (S + share - 1) / share, tile = blockIdx.x / share + first_tile;
  const int slot = tile / tiles_per_slot, s = tile % tiles_per_slot * share + blockIdx.x % share;
  if (s >= S) return;
  const Selection selection(shared_memory());
  const float* mine = scores + long(blockIdx.x) * N;
  int* to = rows + (long(slot) * S + s) * topk;
  const int n = min(N, (start[slot] + s + 1) / ratio), count = min(n, topk);
  int size = 1;
  while (size < count) size <<= 1;
  for (int i = threadIdx.x; i < MOST_SELECTED; i += THREADS) {
    selection.found[i] = i < n && n <= topk ? packed(ordered(mine[i]), i) : 0ull;
  }
  __syncthreads();
  if (n > topk) {
    int equal = topk;
    const unsigned threshold = radix_select(selection, mine, n, equal);
    collect(selection, mine, n, threshold, equal, topk);
  }
  sort_found(selection, size);
  for (int i = threadIdx.x; i < topk; i += THREADS) {
    to[i] = i < count ? static_cast<int>(~static_cast<unsigned>(selection.found[i])) : -1;
  }
}
