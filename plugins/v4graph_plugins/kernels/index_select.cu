// The exact top-k of the indexer's scores, best first, ties to the lowest index. Source: spec section 2.4.
//
// With many tokens a block selects for one (`select`). With few, blocks share a token: each ranks some of its entries
// by counting the better ones, so nobody sorts (`rank`). Counting is quadratic: where there are more than RANKED
// entries, `count` makes a histogram of their scores and `collect` lists those that lie in the last bin needed or
// above; only these are ranked. No result depends on the order of the list.
#include "select.cuh"

constexpr int RANKED = 2048;
constexpr int LISTED = 16384;           // entries of a token's list
constexpr int COUNT_BITS = 13;          // of an ordered score: sign, exponent, four bits of mantissa
constexpr int COUNTS = 1 << COUNT_BITS;
constexpr int WORDS = COUNTS + 32;      // of a token: its histogram, the length of its list, nothing

// Entries that a token of all slots' sees.
DEVICE int visible_to(long token, const int* start, int S, int N, int ratio) {
  return min(N, (start[token / S] + static_cast<int>(token % S) + 1) / ratio);
}

// rows[token] = the topk best of the entries that the token sees, then -1. A tile of `share` rows of scores is one
// slot's; the launch takes the tiles from first_tile on. Shared memory: as `Selection`.
V4_KERNEL(v4_index_select, 512, 2, const float* scores, const int* start, int* rows, int S, int N, int ratio, int topk,
          int share, int first_tile) {
  const int tiles_per_slot = (S + share - 1) / share, tile = blockIdx.x / share + first_tile;
  const int s = tile % tiles_per_slot * share + blockIdx.x % share;
  if (s >= S) return;
  const long token = long(tile / tiles_per_slot) * S + s;
  const Entries entries{scores + long(blockIdx.x) * N, nullptr, visible_to(token, start, S, N, ratio)};
  select_in_block<512>(Selection(shared_memory()), entries, rows + token * topk, topk);
}

// Adds the histogram of the block's share of a token's scores to `counts`. Shared memory: COUNTS words.
V4_KERNEL(v4_index_count, 512, 2, const float* scores, const int* start, unsigned* counts, int S, int N,
          int ratio) {
  const int n = visible_to(blockIdx.y, start, S, N, ratio);
  if (n <= RANKED) return;
  unsigned* bins = reinterpret_cast<unsigned*>(shared_memory());
  for (int i = threadIdx.x * 4; i < COUNTS; i += blockDim.x * 4) store16(bins + i, make_uint4(0, 0, 0, 0));
  __syncthreads();
  const float* mine = scores + long(blockIdx.y) * N;
#pragma unroll 4
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(&bins[ordered(mine[i]) >> (32 - COUNT_BITS)], 1u);
  }
  __syncthreads();
  unsigned* to = counts + long(blockIdx.y) * WORDS;
  for (int i = threadIdx.x; i < COUNTS; i += blockDim.x) {
    if (bins[i]) atomicAdd(&to[i], bins[i]);
  }
}

// Lists the block's share of the entries that may be among the topk best. Shared memory: 36 words.
V4_KERNEL(v4_index_collect, 512, 2, const float* scores, const int* start, unsigned* counts,
          unsigned long long* listed, int S, int N, int ratio, int topk) {
  const int n = visible_to(blockIdx.y, start, S, N, ratio);
  if (n <= RANKED) return;
  unsigned* bins = counts + long(blockIdx.y) * WORDS;
  int* words = reinterpret_cast<int*>(shared_memory());
  find_bin<COUNTS, 512>(bins, words, topk);
  const unsigned least = words[32], lane = threadIdx.x % 32;
  const float* mine = scores + long(blockIdx.y) * N;
  for (int base = blockIdx.x * blockDim.x; base < n; base += gridDim.x * blockDim.x) {
    const int i = base + threadIdx.x;
    const unsigned key = i < n ? ordered(mine[i]) : 0u;
    const bool wanted = i < n && key >> (32 - COUNT_BITS) >= least;
    const unsigned votes = __ballot_sync(FULL, wanted);
    if (votes == 0) continue;
    unsigned at = lane == 0 ? atomicAdd(&bins[COUNTS], static_cast<unsigned>(__popc(votes))) : 0u;
    at = __shfl_sync(FULL, at, 0) + __popc(votes & ((1u << lane) - 1));
    if (wanted && at < LISTED) listed[long(blockIdx.y) * LISTED + at] = packed(key, i);
  }
}

// The entries that `rank` chooses from: all n, or those listed if there are too many and the list holds them.
DEVICE Entries entries_of(int n, const float* scores, const unsigned* counts, const unsigned long long* listed) {
  if (n <= RANKED) return {scores, nullptr, n};
  const int length = static_cast<int>(min(counts[COUNTS], static_cast<unsigned>(LISTED + 1)));
  return length <= LISTED ? Entries{scores, listed, length} : Entries{scores, nullptr, n};
}

// rows[token] as `select` makes it; the blocks of a token share its entries, two a warp at a time. Where too many are
// alike for counting, the first block selects. Shared memory: RANKED keys, or as `Selection`.
V4_KERNEL(v4_index_rank, 256, 2, const float* scores, const int* start, const unsigned* counts,
          const unsigned long long* listed, int* rows, int S, int N, int ratio, int topk) {
  const long token = blockIdx.y;
  const Entries entries = entries_of(visible_to(token, start, S, N, ratio), scores + token * N, counts + token * WORDS,
                                     listed + token * LISTED);
  int* to = rows + token * topk;
  if (entries.count > RANKED) {
    if (blockIdx.x == 0) select_in_block<256>(Selection(shared_memory()), entries, to, topk);
    return;
  }
  unsigned long long* keys = reinterpret_cast<unsigned long long*>(shared_memory());
  const int n = entries.count, padded = (n + 31) / 32 * 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 8
  for (int i = threadIdx.x; i < padded; i += blockDim.x) keys[i] = i < n ? entries[i] : 0ull;
  for (int i = n + blockIdx.x * blockDim.x + threadIdx.x; i < topk; i += gridDim.x * blockDim.x) to[i] = -1;
  __syncthreads();
  for (int first = (blockIdx.x + gridDim.x * warp) * 2; first < n; first += gridDim.x * blockDim.x / 32 * 2) {
    const unsigned long long a = keys[first], b = keys[first + 1];  // n odd: the key after the last is 0
    unsigned better = 0;  // than a; than b in the upper half
#pragma unroll 8
    for (int j = lane; j < padded; j += 32) better += (keys[j] > a ? 1u : 0u) + (keys[j] > b ? 0x10000u : 0u);
    better = __reduce_add_sync(FULL, better);
    const int rank = lane == 0 ? better & 0xffffu : better >> 16;
    if (lane < 2 && first + int(lane) < n && rank < topk) to[rank] = index_of(lane == 0 ? a : b);
  }
}
