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

// Which token a row of scores belongs to. A tile of `share` rows is one slot's.
struct Row {
  long token;   // of all slots'
  int visible;  // entries that it sees; -1: the row is no token's

  DEVICE Row(int row, const int* start, int S, int N, int ratio, int share) {
    const int tiles_per_slot = (S + share - 1) / share, tile = row / share;
    const int slot = tile / tiles_per_slot, s = tile % tiles_per_slot * share + row % share;
    token = long(slot) * S + s;
    visible = s < S ? min(N, (start[slot] + s + 1) / ratio) : -1;
  }
};

// rows[token] = the topk best of the entries that the token sees, then -1. Shared memory: as `Selection`.
V4_KERNEL(v4_index_select, 512, 2, const float* scores, const int* start, int* rows, int S, int N, int ratio, int topk,
          int share, int first_tile) {
  const Row row(blockIdx.x + first_tile * share, start, S, N, ratio, share);
  if (row.visible < 0) return;
  const Entries entries{scores + long(blockIdx.x) * N, nullptr, row.visible};
  select_in_block<512>(Selection(shared_memory()), entries, rows + row.token * topk, topk);
}

// Adds the histogram of the block's share of a token's scores to `counts`. Shared memory: COUNTS words.
V4_KERNEL(v4_index_count, 512, 2, const float* scores, const int* start, unsigned* counts, int S, int N, int ratio,
          int share) {
  const Row row(blockIdx.y, start, S, N, ratio, share);
  if (row.visible <= RANKED) return;
  unsigned* bins = reinterpret_cast<unsigned*>(shared_memory());
  for (int i = threadIdx.x * 4; i < COUNTS; i += blockDim.x * 4) store16(bins + i, make_uint4(0, 0, 0, 0));
  __syncthreads();
  const float* mine = scores + long(blockIdx.y) * N;
#pragma unroll 4
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < row.visible; i += gridDim.x * blockDim.x) {
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
          unsigned long long* listed, int S, int N, int ratio, int topk, int share) {
  const Row row(blockIdx.y, start, S, N, ratio, share);
  if (row.visible <= RANKED) return;
  unsigned* bins = counts + long(blockIdx.y) * WORDS;
  int* words = reinterpret_cast<int*>(shared_memory());
  find_bin<COUNTS, 512>(bins, words, topk);
  const unsigned least = words[32], lane = threadIdx.x % 32;
  const float* mine = scores + long(blockIdx.y) * N;
  for (int base = blockIdx.x * blockDim.x; base < row.visible; base += gridDim.x * blockDim.x) {
    const int i = base + threadIdx.x;
    const unsigned key = i < row.visible ? ordered(mine[i]) : 0u;
    const bool wanted = i < row.visible && key >> (32 - COUNT_BITS) >= least;
    const unsigned votes = __ballot_sync(FULL, wanted);
    if (votes == 0) continue;
    unsigned at = lane == 0 ? atomicAdd(&bins[COUNTS], static_cast<unsigned>(__popc(votes))) : 0u;
    at = __shfl_sync(FULL, at, 0) + __popc(votes & ((1u << lane) - 1));
    if (wanted && at < LISTED) listed[long(blockIdx.y) * LISTED + at] = packed(key, i);
  }
}

// The entries that `rank` chooses from: all, or those listed if there are too many and the list holds them.
DEVICE Entries entries_of(const Row& row, const float* scores, const unsigned* counts,
                          const unsigned long long* listed) {
  if (row.visible <= RANKED) return {scores, nullptr, row.visible};
  const int length = static_cast<int>(min(counts[COUNTS], static_cast<unsigned>(LISTED + 1)));
  return length <= LISTED ? Entries{scores, listed, length} : Entries{scores, nullptr, row.visible};
}

// rows[token] as `select` makes it; the blocks of a token share its entries, two a warp at a time. Where too many are
// alike for counting, the first block selects. Shared memory: RANKED keys, or as `Selection`.
V4_KERNEL(v4_index_rank, 256, 2, const float* scores, const int* start, const unsigned* counts,
          const unsigned long long* listed, int* rows, int S, int N, int ratio, int topk, int share) {
  const Row row(blockIdx.y, start, S, N, ratio, share);
  if (row.visible < 0) return;
  const Entries entries = entries_of(row, scores + long(blockIdx.y) * N, counts + long(blockIdx.y) * WORDS,
                                     listed + long(blockIdx.y) * LISTED);
  int* to = rows + row.token * topk;
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
