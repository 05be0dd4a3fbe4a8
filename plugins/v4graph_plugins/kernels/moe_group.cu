// Pairs (token, chosen expert) sorted by expert for the grouped products, and the sum over a token's experts.
// Source: spec section 3.
#include "moe_experts.cuh"

// The pair's expert, or `none` where it does not count: an expert that is not there, or one that the token names a
// second time. The first naming then takes the gains of all.
DEVICE int counted_expert(const int* ids, long pair, int K, int E, int none) {
  const int expert = ids[pair];
  if (expert < 0 || expert >= E) return none;
  for (long other = pair / K * K; other < pair; ++other) {
    if (ids[other] == expert) return none;
  }
  return expert;
}

DEVICE float merged_gain(const int* ids, const float* weights, long pair, int K) {
  float gain = 0.f;
  for (long other = pair; other < (pair / K + 1) * K; ++other) gain += ids[other] == ids[pair] ? weights[other] : 0.f;
  return gain;
}

// Lanes whose value (of `bits` bits) is this lane's.
DEVICE unsigned lanes_like(int value, int bits) {
  unsigned same = FULL;
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = value >> bit & 1;
    const unsigned votes = __ballot_sync(FULL, set);
    same &= set ? votes : ~votes;
  }
  return same;
}

// Number the pairs of a warp, first to last, within their experts: place[pair], with the counts in counts[E].
DEVICE void rank_pairs(const int* ids, int* place, int* counts, long first, long last, int K, int E) {
  const int lane = threadIdx.x % 32, bits = 32 - __clz(E);
  for (long base = first; base < last; base += 32) {
    const long pair = base + lane;
    const int expert = pair < last ? counted_expert(ids, pair, K, E, E) : E;
    const unsigned same = lanes_like(expert, bits);
    const int before = __popc(same & ((1u << lane) - 1));
    const int start = expert < E ? counts[expert] : 0;
    __syncwarp();
    if (expert < E && before == 0) counts[expert] = start + __popc(same);
    __syncwarp();
    if (pair < last) place[pair] = expert < E ? start + before : -1;
  }
}

// Sums over the threads before this one, of two numbers; `scratch` is 64 ints.
DEVICE int2 sums_before(int a, int b, int* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int2 sum = make_int2(a, b);
  for (int by = 1; by < 32; by *= 2) {
    const int x = __shfl_up_sync(FULL, sum.x, by), y = __shfl_up_sync(FULL, sum.y, by);
    if (lane >= by) sum = make_int2(sum.x + x, sum.y + y);
  }
  if (lane == 31) {
    scratch[warp] = sum.x;
    scratch[32 + warp] = sum.y;
  }
  __syncthreads();
  sum = make_int2(sum.x - a, sum.y - b);
  for (int w = 0; w < warp; ++w) sum = make_int2(sum.x + scratch[w], sum.y + scratch[32 + w]);
  return sum;
}

struct Grouping {
  const int* ids;
  const float* weights;
  int* place;
  int* token_of;
  float* gain_of;
  int4* tiles;
  int pairs, K, E, tile, bound;
};

// For one block of 1024 threads; shared memory: 32 * E counts, then 64 ints.
DEVICE void group_pairs(const Grouping& g) {
  int* counts = reinterpret_cast<int*>(shared_memory());
  int* scratch = counts + 32 * g.E;
  const int thread = threadIdx.x, warp = thread / 32, E = g.E;
  const int share = (g.pairs + 1023) / 1024 * 32, warps = (g.pairs + share - 1) / share;  // pairs of a warp
  for (int i = thread; i < warps * E; i += 1024) counts[i] = 0;
  __syncthreads();
  const long first = long(warp) * share, last = min(first + share, long(g.pairs));
  rank_pairs(g.ids, g.place, counts + warp * E, first, last, g.K, E);
  __syncthreads();
  int rows = 0;
  for (int w = 0; w < warps && thread < E; ++w) rows += counts[w * E + thread];
  const int count = (rows + g.tile - 1) / g.tile;
  const int2 before = sums_before(rows, count, scratch);
  int row = before.x;
  for (int w = 0; w < warps && thread < E; ++w) {
    const int here = counts[w * E + thread];
    counts[w * E + thread] = row;
    row += here;
  }
  for (int i = 0; i < count; ++i) {
    g.tiles[before.y + i] = make_int4(thread, before.x + i * g.tile, min(g.tile, rows - i * g.tile), 0);
  }
  if (thread == 1023) scratch[63] = before.y + count;  // which no thread reads in sums_before
  __syncthreads();
  for (int i = scratch[63] + thread; i < g.bound; i += 1024) g.tiles[i] = make_int4(0, 0, 0, 0);
  for (int pair = thread; pair < g.pairs; pair += 1024) {
    if (g.place[pair] < 0) continue;
    const int at = counts[pair / share * E + g.ids[pair]] + g.place[pair];
    g.place[pair] = at;
    g.token_of[at] = pair / g.K;
    g.gain_of[at] = merged_gain(g.ids, g.weights, pair, g.K);
  }
}

// The first block groups; the others round the tokens x [T, D] to FP8, 64 blocks of 128 each. place[T * K] is the
// pair's row in expert order or -1; token_of and gain_of are by row; tiles are (expert, first row, rows, 0), at most
// `tile` rows each, then zeros up to `bound`. Rows of an expert are in the order of the tokens.
V4_KERNEL(v4_moe_prepare, 1024, 1, const int* ids, const float* weights, int* place, int* token_of, float* gain_of,
          int4* tiles, int pairs, int K, int E, int tile, int bound, const bf16* x, bf16* rounded, int blocks) {
  if (blockIdx.x == 0) {
    group_pairs({ids, weights, place, token_of, gain_of, tiles, pairs, K, E, tile, bound});
    return;
  }
  const long first = (blockIdx.x - 1) * 64L;
  round_blocks(
      min(64L, blocks - first), [&](long i) { return x + (first + i) * 128; },
      [&](long i) { return rounded + (first + i) * 128; });
}

// Round inner products to FP8 in place: `blocks` blocks of 128, 16 per block of threads.
V4_KERNEL(v4_moe_round, 256, 4, bf16* inner, int blocks) {
  const long first = blockIdx.x * 16L;
  const auto at = [&](long i) { return inner + (first + i) * 128; };
  round_blocks(min(16L, blocks - first), at, at);
}

DEVICE void add_row(Floats8& sum, const bf16* row) {
  const Floats8 values = unpack8(load16(row));
  for (int i = 0; i < 8; ++i) sum.v[i] += values.v[i];
}

DEVICE void add_row(Floats8& sum, const float* row) {
  for (int half = 0; half < 2; ++half) {
    const float4 values = *reinterpret_cast<const float4*>(row + 4 * half);
    const float four[4] = {values.x, values.y, values.z, values.w};
    for (int i = 0; i < 4; ++i) sum.v[4 * half + i] += four[i];
  }
}

// y[t] = shared expert + its rows in the order of the experts, which is that of the rows. 128 threads, 8 channels each;
// K <= 32. Shared memory: 32 ints.
template <class Row>
DEVICE void combine(const Row* routed, const Row* always, const int* place, bf16* y, int K, int D) {
  int* rows = reinterpret_cast<int*>(shared_memory());
  const long token = blockIdx.x;
  const int column = (blockIdx.y * 128 + threadIdx.x) * 8, k = threadIdx.x;
  if (k < K) {
    const int mine = place[token * K + k];
    int before = 0;
    for (int i = 0; i < K; ++i) {
      // Unsigned, rows that are not there (-1) come last.
      const unsigned other = unsigned(place[token * K + i]);
      before += other < unsigned(mine) || (other == unsigned(mine) && i < k);
    }
    rows[before] = mine;
  }
  __syncthreads();
  if (column >= D) return;
  Floats8 sum = {};
  add_row(sum, always + token * D + column);
  for (int i = 0; i < K && rows[i] >= 0; ++i) add_row(sum, routed + long(rows[i]) * D + column);
  store16(y + token * D + column, pack8(sum));
}

V4_KERNEL(v4_moe_combine, 128, 8, const bf16* routed, const bf16* always, const int* place, bf16* y, int K, int D) {
  combine(routed, always, place, y, K, D);
}

V4_KERNEL(v4_moe_combine_float, 128, 8, const float* routed, const float* always, const int* place, bf16* y, int K,
          int D) {
  combine(routed, always, place, y, K, D);
}
