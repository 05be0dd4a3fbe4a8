// The compressor: one cache entry per block of R tokens, and the rings of rows that later blocks need.
// Source: spec section 2.3.
#pragma once
#include "rounding.cuh"

constexpr int LANES = 128;  // threads that share a row's channels, four each
constexpr int GROUPS = 4;   // of LANES threads, each with a quarter of the rows

struct Compressor {
  const float *kv, *gate, *ape;
  const bf16* norm;
  const float* freqs;
  const int *start, *num;
  float *tail_kv, *tail_gate;
  bf16* cache;
  int S, C, CC, R, L, N, F, overlap, quantise;
  float eps;
};

DEVICE float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Value and gate of four channels at a position: from the chunk, or from the rings.
DEVICE void row_at(const Compressor& c, long slot, int position, int channel, float (&value)[4], float (&gate)[4]) {
  const int s = position - c.start[slot];
  float4 v, g, a = make_float4(0.f, 0.f, 0.f, 0.f);
  if (s >= 0) {
    const long at = (slot * c.S + s) * c.CC + channel;
    v = load4(c.kv + at);
    g = load4(c.gate + at);
    a = load4(c.ape + long(position % c.R) * c.CC + channel);
  } else {
    const long at = (slot * c.L + position % c.L) * c.CC + channel;
    v = load4(c.tail_kv + at);
    g = load4(c.tail_gate + at);  // has ape in it
  }
  value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
  gate[0] = g.x + a.x, gate[1] = g.y + a.y, gate[2] = g.z + a.z, gate[3] = g.w + a.w;
}

// Softmax-weighted sum over a block's rows, per channel; kept as peak, total and sum so that parts can be merged.
struct Pool {
  float peak[4], total[4], sum[4];
};

DEVICE Pool pool_rows(const Compressor& c, long slot, int block, int channel, int group) {
  Pool pool;
  for (int i = 0; i < 4; ++i) pool.peak[i] = -INFINITY, pool.total[i] = pool.sum[i] = 0.f;
  const int rows = c.overlap ? 2 * c.R : c.R, first = (block + 1) * c.R - rows;
#pragma unroll 4
  for (int k = group; k < rows; k += GROUPS) {
    if (first + k < 0) continue;
    float value[4], gate[4];
    // With overlap the block before gives the first half of its channels, the block itself the second.
    row_at(c, slot, first + k, channel + (c.overlap && k >= c.R ? c.C : 0), value, gate);
    for (int i = 0; i < 4; ++i) {
      const float peak = fmaxf(pool.peak[i], gate[i]);
      const float before = expf(pool.peak[i] - peak), weight = expf(gate[i] - peak);
      pool.total[i] = pool.total[i] * before + weight;
      pool.sum[i] = pool.sum[i] * before + weight * value[i];
      pool.peak[i] = peak;
    }
  }
  return pool;
}

// Merge the groups' pools into group 0's, rounded to bf16; `shared` holds GROUPS * LANES pools.
DEVICE void merge_pools(const Pool& mine, Pool* shared, float (&entry)[4]) {
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    float peak = -INFINITY, total = 0.f, sum = 0.f;
    for (int g = 0; g < GROUPS; ++g) peak = fmaxf(peak, shared[g * LANES + threadIdx.x % LANES].peak[i]);
    for (int g = 0; g < GROUPS; ++g) {
      const Pool& part = shared[g * LANES + threadIdx.x % LANES];
      const float weight = expf(part.peak[i] - peak);
      total += weight * part.total[i];
      sum += weight * part.sum[i];
    }
    entry[i] = round_bf16(sum / total);
  }
}

// Norm, rotation and rounding of an entry, four channels a thread, in the threads of group 0.
DEVICE void finish_entry(const Compressor& c, float (&entry)[4], int position, bool mine, float* scratch) {
  const int channel = threadIdx.x % LANES * 4;
  float square = 0.f;
  for (int i = 0; i < 4; ++i) square += entry[i] * entry[i];
  const float scale = rsqrtf(block_sum(mine ? square : 0.f, scratch) / c.C + c.eps);
  if (mine) {
    for (int i = 0; i < 4; ++i) entry[i] = round_bf16(entry[i] * scale * to_float(c.norm[channel + i]));
    const int turned = channel - (c.C - 2 * c.F);
    if (turned >= 0) {
      for (int i = 0; i < 4; i += 2) rotate(entry[i], entry[i + 1], position, c.freqs[(turned + i) / 2]);
      for (int i = 0; i < 4; ++i) entry[i] = round_bf16(entry[i]);
    }
  }
  if (c.quantise == 1) {  // "kv": FP8 in blocks of 64 channels, 16 threads
    float amax = 0.f;
    for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fabsf(entry[i]));
    for (int offset = 8; offset; offset >>= 1) amax = fmaxf(amax, __shfl_xor_sync(FULL, amax, offset));
    if (channel < c.C - 2 * c.F) {
      const float step = fp8_scale(amax);
      for (int i = 0; i < 4; ++i) entry[i] = fake_fp8(entry[i], step);
    }
  }
  if (c.quantise == 2) {  // "index": the 128 channels are the first warp's
    hadamard_128(entry);
    for (int i = 0; i < 4; ++i) entry[i] = round_bf16(entry[i]);
    fake_fp4_128(entry);
  }
}

// Entry `closing` of those that the chunk may close.
DEVICE void compress_block(const Compressor& c, long slot, int closing) {
  const int start = c.start[slot], block = start / c.R + closing;
  if ((block + 1) * c.R > start + c.num[slot] || block >= c.N) return;
  Pool* pools = reinterpret_cast<Pool*>(shared_memory());
  float* scratch = reinterpret_cast<float*>(pools + GROUPS * LANES);
  const int group = threadIdx.x / LANES, channel = threadIdx.x % LANES * 4;
  const bool inside = channel < c.C, mine = inside && group == 0;
  // Threads past the last channel work on the last four and are not heard.
  const Pool pool = pool_rows(c, slot, block, inside ? channel : c.C - 4, group);
  float entry[4];
  merge_pools(pool, pools, entry);
  finish_entry(c, entry, block * c.R, mine, scratch);
  if (!mine) return;
  bf16* to = c.cache + (slot * c.N + block) * c.C + channel;
  *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(entry[0], entry[1]), pack_bf16(entry[2], entry[3]));
}

// The row of one token of the chunk becomes the newest of its row of the rings.
DEVICE void write_tail(const Compressor& c, long token) {
  const long slot = token / c.S;
  const int s = static_cast<int>(token % c.S), count = c.num[slot];
  if (s >= count || s < count - c.L) return;
  const int position = c.start[slot] + s;
  const long to = (slot * c.L + position % c.L) * c.CC;
  for (int channel = threadIdx.x * 4; channel < c.CC; channel += blockDim.x * 4) {
    float value[4], gate[4];
    row_at(c, slot, position, channel, value, gate);
    *reinterpret_cast<float4*>(c.tail_kv + to + channel) = make_float4(value[0], value[1], value[2], value[3]);
    *reinterpret_cast<float4*>(c.tail_gate + to + channel) = make_float4(gate[0], gate[1], gate[2], gate[3]);
  }
}

// Blocks 0 .. entries-1 close blocks of tokens, the others write the rings. Both may share a launch where
// S <= L - rows + 1 (rows: R, or 2 R with overlap): the rings' rows that are overwritten hold positions up to
// start + S - 1 - L <= start - rows, and a block that closes at `start` or later reads none below start + 1 - rows.
DEVICE void compress_or_write(const Compressor& c, int index, int entries, int closing) {
  if (index < entries) {
    compress_block(c, index / closing, index % closing);
  } else {
    write_tail(c, index - entries);
  }
}
