// Attention of a run of query tokens, 64 heads a block, token after token: for many tokens, without splits of the keys.
//
// Scores: warp w multiplies 32 heads (w / 4) by a quarter of the channels (w % 4), which it holds of q in registers;
// the four warps of the same heads swap sums, so that each ends up with 8 heads' scores. Output: warp w owns channels
// 64w .. 64w+63 of all heads. The next token's keys and queries are on their way before the one before is done.
// Source: spec sections 2.2, 2.4, 2.5; docs/design-notes/2026-11-27-attention-tiles.md.
#pragma once
#include "attention_keys.cuh"

constexpr int HEADS = 64;
constexpr int AHEAD = 4;        // tiles that are listed at once, a warp each: four after those in use
constexpr int LISTS = 2 * AHEAD;
constexpr int RUN = 4;          // most tokens of a block
constexpr float GROWTH = 8.f;   // a peak stays until scores pass it by this power of two: sums are rescaled rarely

// Shared memory, in this order. Rows of keys and of P are stored with their 16-byte parts permuted, so that the eight
// rows that ldmatrix reads at once lie in different banks.
struct Shared {
  bf16* tiles;        // [STAGES][TILE][HEAD]
  float4* sums;       // [16 keys][warp that adds up][the other three of its heads][lane]
  bf16* p;            // [HEADS][TILE]
  float *factor, *last;  // [HEADS]: of the sums before this tile; of the sums when all is added
  float* sinks;       // [HEADS], in powers of two
  float2* turns;      // [RUN][ROTATED / 2]
  const bf16** rows;  // [LISTS][TILE], null for none
  int* ends;          // [RUN]: tiles up to the end of each token
  unsigned* there;    // [LISTS]: a bit a key that there is
  Span* spans;        // [RUN]
  float2* running;    // [THREADS]: peak of the thread's head, and the thread's part of its total
  int* block;         // its first token, tokens and first head: registers are short

  DEVICE explicit Shared(unsigned char* base) {
    tiles = reinterpret_cast<bf16*>(base);
    sums = reinterpret_cast<float4*>(tiles + STAGES * TILE * HEAD);
    p = reinterpret_cast<bf16*>(sums + 2 * 8 * 3 * 32);
    factor = reinterpret_cast<float*>(p + HEADS * TILE);
    last = factor + HEADS;
    sinks = last + HEADS;
    turns = reinterpret_cast<float2*>(sinks + HEADS);
    running = turns + RUN * ROTATED / 2;
    rows = reinterpret_cast<const bf16**>(running + THREADS);
    ends = reinterpret_cast<int*>(rows + LISTS * TILE);
    there = reinterpret_cast<unsigned*>(ends + RUN);
    spans = reinterpret_cast<Span*>(there + LISTS);
    block = reinterpret_cast<int*>(spans + RUN);
  }
  DEVICE int first() const { return block[0]; }
  DEVICE int tokens() const { return block[1]; }
  DEVICE int first_head() const { return block[2]; }
  DEVICE bf16* key_part(int stage, int key, int part) const {
    return tiles + (stage * TILE + key) * HEAD + (part ^ (key & 7)) * 8;
  }
  DEVICE bf16* p_part(int head, int part) const { return p + head * TILE + (part ^ (head >> 1 & 3)) * 8; }
  // Where warp `to` gets sums of 16 keys from another warp of the same heads: the three others, in order.
  DEVICE float4* swap(int half, int to, int other) const {
    return sums + ((half * 8 + to) * 3 + other) * 32 + threadIdx.x % 32;
  }
};

// Which of the block's tokens a tile is of, and which of its tiles; the number of tokens past the last.
struct Step {
  int token, tile;

  DEVICE Step(const Shared& shared, int number) {
    token = tile = 0;
    for (int i = 0; i < RUN; ++i) {
      const int end = shared.ends[i];
      token += number >= end;
      tile = number >= end ? end : tile;
    }
    tile = number - tile;
  }
};

// Keys of a token, without the -1 at the end of a selection: early queries see few entries.
DEVICE int count_keys(const KeyList& list) {
  if (!list.from.rows) return list.count;
  const int* rows = list.from.rows + long(list.token) * list.from.K;
  int found = 0;
#pragma unroll 8
  for (int i = threadIdx.x % 32; i < list.from.K; i += 32) {
    if (rows[i] >= 0) found = i + 1;
  }
  for (int offset = 16; offset; offset >>= 1) found = max(found, __shfl_xor_sync(FULL, found, offset));
  return list.near + found;
}

// What depends on a token's position only: a warp a token.
DEVICE void describe_run(const Shared& shared, const Call& call, const Keys& keys) {
  const int warp = threadIdx.x / 32, token = shared.first() + warp;
  if (warp >= shared.tokens()) return;
  const int start = call.start[token / keys.S];
  KeyList list(keys, token, start);
  list.count = count_keys(list);
  write_turns(shared.turns + warp * ROTATED / 2, call.freqs, start + token % keys.S);
  shared.spans[warp] = list;
}

DEVICE void count_tiles(const Shared& shared) {
  for (int i = 0, tiles = 0; i < RUN; ++i) {
    if (i < shared.tokens()) tiles += (shared.spans[i].count + TILE - 1) / TILE;
    shared.ends[i] = i < shared.tokens() ? tiles : 0x7fffffff;
  }
}

// A warp lists tile `number`, in two steps, so that it does not wait for a selection's rows: the lane's key of it ...
DEVICE int find_key(const Shared& shared, const Keys& keys, int number) {
  const Step step(shared, number);
  if (step.token >= shared.tokens()) return -1;
  return KeyList(keys, shared.spans[step.token]).key(step.tile * TILE + threadIdx.x % 32);
}

// ... and where it lies.
DEVICE void list_key(const Shared& shared, const Keys& keys, int number, int key) {
  const KeyList list(keys, shared.spans[min(Step(shared, number).token, shared.tokens() - 1)]);
  shared.rows[number % LISTS * TILE + threadIdx.x % 32] = key < 0 ? nullptr : list.row(key);
  shared.there[number % LISTS] = __ballot_sync(FULL, key >= 0);
}

DEVICE void copy_tile(const Shared& shared, const Keys& keys, int number) {
  const int part = threadIdx.x % 64, first = threadIdx.x / 64;
#pragma unroll 4
  for (int i = 0; i < TILE * 64 / THREADS; ++i) {
    const int r = first + i * (THREADS / 64);
    const bf16* row = shared.rows[number % LISTS * TILE + r];
    cp_async16(shared.key_part(number % STAGES, r, part), (row ? row : keys.kv) + part * 8, row != nullptr);
  }
  cp_async_commit();
}

// What a warp holds of q: 128 channels of 32 heads, as operands of mma. Heads past H are zeros.
struct Queries {
  unsigned part[2][8][4];

  DEVICE void load(const Shared& shared, const Call& call, int index) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = shared.first_head() + warp / 4 * 32 + lane / 4, token = shared.first() + index;
    const bf16* from = call.q + (long(token) * call.H + first) * HEAD + warp % 4 * 128 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int row = m * 16 + side * 8;
        const bool there = first + row < call.H;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const bf16* pair = from + row * HEAD + k * 16;
          part[m][k][side] = there ? *reinterpret_cast<const unsigned*>(pair) : 0u;
          part[m][k][side + 2] = there ? *reinterpret_cast<const unsigned*>(pair + 8) : 0u;
        }
      }
    }
  }
};

// The lane's scores are those of head 8 * warp + lane / 4 with keys 16 * half + 2 * (lane % 4) + {0, 1, 8, 9}. The first
// half's sums wait in the rows of P that the warp writes, which nobody reads then: registers are short.
DEVICE float4* kept_sums(const Shared& shared) {
  return reinterpret_cast<float4*>(shared.p + threadIdx.x / 32 * 8 * TILE) + threadIdx.x % 32;
}

// Products with the tile's keys over the warp's channels; those of the other warps' heads are left to them.
DEVICE void score_tile(const Shared& shared, const Queries& q, int stage, float4& own) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quarter = warp % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum[2][2][4] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      unsigned r[4];
      ldmatrix_x4(r, shared.key_part(stage, half * 16 + lane / 16 * 8 + lane % 8, quarter * 16 + k * 2 + lane / 8 % 2));
      const unsigned low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_bf16(sum[m][0], q.part[m][k], low);
        mma_bf16(sum[m][1], q.part[m][k], high);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float *low = sum[i / 2][0] + i % 2 * 2, *high = sum[i / 2][1] + i % 2 * 2;
      const float4 sums = {low[0], low[1], high[0], high[1]};
      if (i != quarter) {
        *shared.swap(half, warp / 4 * 4 + i, quarter - (quarter > i)) = sums;
      } else if (half == 0) {
        *kept_sums(shared) = sums;
      } else {
        own = sums;
      }
    }
  }
}

// Add up the warps' products, mask and scale them.
DEVICE void gather_scores(const Shared& shared, float4 own, int number, float scale, float (&score)[8]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float4 sum = half ? own : *kept_sums(shared);
#pragma unroll
    for (int other = 0; other < 3; ++other) {
      const float4 more = *shared.swap(half, warp, other);
      sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
    }
    const unsigned there = shared.there[number % LISTS] >> (half * 16 + lane % 4 * 2);
    score[half * 4] = there & 1 ? sum.x * scale : NONE;
    score[half * 4 + 1] = there & 2 ? sum.y * scale : NONE;
    score[half * 4 + 2] = there & 0x100 ? sum.z * scale : NONE;
    score[half * 4 + 3] = there & 0x200 ? sum.w * scale : NONE;
  }
  __syncwarp();  // the lanes have their sums, P may be written
}

// Turn the scores into p = 2^(score - peak), in bf16; the softmax runs on from the tile before, if there is one.
DEVICE void softmax_tile(const Shared& shared, float4 own, int number, float scale, bool begins) {
  const int lane = threadIdx.x % 32, head = threadIdx.x / 4;
  float score[8];
  gather_scores(shared, own, number, scale, score);
  const float2 before = begins ? make_float2(NONE, 0.f) : shared.running[threadIdx.x];
  float peak = score[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) peak = fmaxf(peak, score[i]);
  peak = fmaxf(peak, __shfl_xor_sync(FULL, peak, 1));
  peak = fmaxf(peak, __shfl_xor_sync(FULL, peak, 2));
  if (!(peak > before.x + GROWTH)) peak = before.x;
  const float base = peak == NONE ? 0.f : peak, factor = exp2f(before.x - base);
  float sum = 0.f;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const float a = exp2f(score[part * 2] - base), b = exp2f(score[part * 2 + 1] - base);
    sum += a + b;
    *reinterpret_cast<unsigned*>(shared.p_part(head, part) + lane % 4 * 2) = pack_bf16(a, b);
  }
  shared.running[threadIdx.x] = make_float2(peak, before.y * factor + sum);
  if (lane % 4 == 0) shared.factor[head] = factor;
}

// What the sums of a head are multiplied with at the end.
DEVICE void finish_softmax(const Shared& shared) {
  const int head = threadIdx.x / 4;
  const float peak = shared.running[threadIdx.x].x;
  float total = shared.running[threadIdx.x].y;
  total += __shfl_xor_sync(FULL, total, 1);
  total += __shfl_xor_sync(FULL, total, 2);
  if (threadIdx.x % 4 == 0) shared.last[head] = 1.f / (total + exp2f(shared.sinks[head] - peak));
}

// The warp's 64 channels of the output, unnormalised: [16 heads each][8 channels each][fragment].
struct Output {
  float sum[4][8][4];

  // A factor of 0 begins a token: what the one before left, NaNs included, is gone.
  DEVICE void rescale(const float* factors) {
    float factor[8];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      factor[i] = factors[i * 8 + threadIdx.x % 32 / 4];
      grown = grown || factor[i] != 1.f;
    }
    if (!__any_sync(FULL, grown)) return;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = factor[m * 2 + i / 2] == 0.f ? 0.f : sum[m][n][i] * factor[m * 2 + i / 2];
      }
    }
  }
};

DEVICE void value_tile(const Shared& shared, Output& out, int stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < TILE / 16; ++k) {
    unsigned p[4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) ldmatrix_x4(p[m], shared.p_part(m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      unsigned r[4];
      ldmatrix_x4_trans(r, shared.key_part(stage, k * 16 + lane % 16, warp * 8 + n + lane / 16));
      const unsigned low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        mma_bf16(out.sum[m][n], p[m], low);
        mma_bf16(out.sum[m][n + 1], p[m], high);
      }
    }
  }
}
