// Selection of the largest in one block: radix select and a bitonic sort.
#pragma once
#include "device.cuh"

constexpr int BINS = 2048;
constexpr int MOST_SELECTED = 1024;

// Bits that order like the value; both zeros are one.
DEVICE unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A key that no two entries share: of equal scores, the lower index is the larger.
DEVICE unsigned long long packed(unsigned key, int index) {
  return static_cast<unsigned long long>(key) << 32 | static_cast<unsigned>(~index);
}

DEVICE int index_of(unsigned long long key) { return static_cast<int>(~static_cast<unsigned>(key)); }

// What a block selects from: scores, or keys in any order.
struct Entries {
  const float* scores;
  const unsigned long long* listed;  // or null
  int count;

  DEVICE unsigned long long operator[](int i) const { return listed ? listed[i] : packed(ordered(scores[i]), i); }
};

// Shared memory of a selection: 8 * 1024 + 4 * 2048 + 4 * 36 bytes.
struct Selection {
  unsigned long long* found;  // [MOST_SELECTED] keys
  unsigned* bins;             // [BINS], or as many bytes of keys
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
  if (lane == 31) words[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += words[w];
  return sum - value;
}

// The bin in which the `wanted`-th value from the top lies: words[32] becomes it, words[33] how many lie above it,
// words[34] how many in it.
template <int COUNT, int THREADS>
DEVICE void find_bin(const unsigned* bins, int* words, int wanted) {
  constexpr int EACH = COUNT / THREADS;
  const int top = COUNT - 4 - threadIdx.x * EACH;
  int here[EACH], count = 0;
#pragma unroll
  for (int i = 0; i < EACH; i += 4) {
    const uint4 four = load16(bins + top - i);
    here[i] = four.w, here[i + 1] = four.z, here[i + 2] = four.y, here[i + 3] = four.x;
    count += four.x + four.y + (four.z + four.w);
  }
  int above = sum_before(count, words);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (above < wanted && wanted <= above + here[i]) {
      words[32] = top + 3 - i;
      words[33] = above;
      words[34] = here[i];
    }
    above += here[i];
  }
  __syncthreads();
}

// The `wanted`-th largest key, or a lower bound that no other key reaches. Eleven bits a pass, until a bin belongs to
// the selection as a whole.
template <int THREADS>
DEVICE unsigned long long least_selected(const Selection& s, const Entries& entries, int wanted) {
  unsigned long long prefix = 0;
  for (int known = 64; known;) {
    const int shift = max(known - 11, 0);
    for (int i = threadIdx.x * 4; i < BINS; i += THREADS * 4) store16(s.bins + i, make_uint4(0, 0, 0, 0));
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < entries.count; i += THREADS) {
      const unsigned long long key = entries[i];
      if (known == 64 || key >> known == prefix >> known) {
        atomicAdd(&s.bins[key >> shift & ((1u << (known - shift)) - 1)], 1u);
      }
    }
    __syncthreads();
    find_bin<BINS, THREADS>(s.bins, s.words, wanted);
    prefix |= static_cast<unsigned long long>(s.words[32]) << shift;
    wanted -= s.words[33];
    const bool whole = wanted == s.words[34];
    __syncthreads();
    if (whole) break;
    known = shift;
  }
  return prefix;
}

// Copy the keys from `least` on to `found`, in any order.
template <int THREADS>
DEVICE void collect(const Selection& s, const Entries& entries, unsigned long long least) {
  if (threadIdx.x == 0) s.words[35] = 0;
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < entries.count; i += THREADS) {
    const unsigned long long key = entries[i];
    if (key >= least) s.found[atomicAdd(&s.words[35], 1)] = key;
  }
  __syncthreads();
}

// One stage of a bitonic sort, largest first; mine[e] is entry threadIdx.x + e * THREADS. Entries of one warp meet by
// shuffles, of one thread in registers, others in `exchanged`.
template <int THREADS, int EACH>
DEVICE void sort_stage(unsigned long long (&mine)[EACH], unsigned long long* exchanged, int run, int step) {
  unsigned long long other[EACH];
  if (step >= THREADS) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const unsigned long long next = mine[(e ^ 1) % EACH], second = mine[(e ^ 2) % EACH];
      other[e] = step == THREADS ? next : second;
    }
  } else if (step >= 32) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) exchanged[threadIdx.x + e * THREADS] = mine[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; ++e) other[e] = exchanged[(threadIdx.x ^ step) + e * THREADS];
  } else {
#pragma unroll
    for (int e = 0; e < EACH; ++e) other[e] = __shfl_xor_sync(FULL, mine[e], step);
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = threadIdx.x + e * THREADS;
    const bool larger = ((i & step) == 0) == ((i & run) == 0);
    if (larger == (other[e] > mine[e])) mine[e] = other[e];
  }
}

// to[0 .. count) = the indices of the `count` keys that `load(i)` returns, largest first. Two stages in a row do not
// exchange through the same memory, so that one barrier each is enough; `found` may still be read in the first.
template <int THREADS, int EACH, class Load>
DEVICE void sort_and_store(const Selection& s, int* to, int count, Load load) {
  unsigned long long mine[EACH];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = threadIdx.x + e * THREADS;
    mine[e] = i < count ? load(i) : 0ull;
  }
  unsigned long long *next = reinterpret_cast<unsigned long long*>(s.bins), *after = s.found;
#pragma unroll 1
  for (int run = 2; run < 2 * count; run <<= 1) {
#pragma unroll 1
    for (int step = run / 2; step; step >>= 1) {
      sort_stage<THREADS, EACH>(mine, next, run, step);
      if (step < 32 || step >= THREADS) continue;
      unsigned long long* const used = next;
      next = after;
      after = used;
    }
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = threadIdx.x + e * THREADS;
    if (i < count) to[i] = index_of(mine[e]);
  }
}

// to[0 .. topk) = the indices of the largest entries, largest first, then -1.
template <int THREADS>
DEVICE void select_in_block(const Selection& s, const Entries& entries, int* to, int topk) {
  const int count = min(entries.count, topk);
  const bool all = count == entries.count;
  for (int i = count + threadIdx.x; i < topk; i += THREADS) to[i] = -1;
  if (!all) collect<THREADS>(s, entries, least_selected<THREADS>(s, entries, topk));
  auto load = [&](int i) { return all ? entries[i] : s.found[i]; };
  if (count <= THREADS) {
    sort_and_store<THREADS, 1>(s, to, count, load);
  } else {
    sort_and_store<THREADS, MOST_SELECTED / THREADS>(s, to, count, load);
  }
}
