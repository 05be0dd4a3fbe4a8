// Rows times 16 rows of each of two weight matrices on tensor cores, for one warp: a few rows that every lane reads for
// itself, or 64 that a block keeps in shared memory.
//
// The weights are the 16-row operand of mma.m16n8k16, the activations its 8 columns. Both sides take the channels of a
// 128-wide block in an order that lets a lane load 16 consecutive bytes of a weight row straight into its fragment, so
// a weight is decoded once per block. Products are exact and summed in float32. In the quantised forms activations are
// values rounded to FP8, 1x128, and lie in "pair order": of eight consecutive channels 0 4 1 5 2 6 3 7, because two
// codes 4 apart decode into the halves of one word.
#pragma once
#include "rounding.cuh"

// FP8_ROUNDED: code times scale is rounded to bf16, as the official code does where activations are not quantised; the
// same as FP8 for e8m0 scales.
enum class Format { BF16, FP8, FP8_ROUNDED, FP4 };

template <Format F>
constexpr bool IS_FP8 = F == Format::FP8 || F == Format::FP8_ROUNDED;

// A weight matrix [rows, columns], 16-byte aligned, columns a multiple of 128. FP8: `scales` [cdiv(rows, 128),
// columns / 128], e8m0 (scale_bytes 1) or float32 (4). FP4: `scales` [rows, columns / 32], e8m0 from 2^-63 to 2^62.
struct Weights {
  const unsigned char* codes;
  const unsigned char* scales;
  int scale_bytes, rows, columns;
};

// 16-byte loads that a lane makes of its share of a 128-wide block of a row.
template <Format F>
constexpr int LOADS = F == Format::BF16 ? 4 : IS_FP8<F> ? 2 : 1;

// FP4 weights enter the products 2^-62 too small, so that one multiplication decodes and scales them.
constexpr float FP4_TOO_SMALL = 4611686018427387904.f;

// Eight values of a 128-wide block rounded to FP8, in pair order; 16 neighbouring lanes hold a block.
DEVICE uint4 round_eight(uint4 raw) {
  const Floats8 in = unpack8(raw);
  float amax = 0.f;
  for (int i = 0; i < 8; ++i) amax = fmaxf(amax, fabsf(in.v[i]));
  for (int bit = 8; bit; bit >>= 1) amax = fmaxf(amax, __shfl_xor_sync(FULL, amax, bit));
  const float scale = fp8_scale(amax), inverse = __uint_as_float(0x7f000000u - __float_as_uint(scale));
  float out[8];
  for (int i = 0; i < 8; ++i) {
    out[i] = round_e4m3(in.v[i] * inverse) * scale;  // 448 at most, but for what the scale was rounded by
  }
  return make_uint4(pack_bf16(out[0], out[4]), pack_bf16(out[1], out[5]), pack_bf16(out[2], out[6]),
                    pack_bf16(out[3], out[7]));
}

template <Format F>
struct RawBlock {
  uint4 codes[2][LOADS<F>];  // of rows lane / 4 and lane / 4 + 8
  unsigned scale[2];             // FP4: the byte; FP8: byte or float bits, in [0]
};

// Where a lane reads rows row0 + lane / 4 and 8 further on (row0 a multiple of 16); rows past the last are the last.
template <Format F>
struct RowsLane {
  const unsigned char* codes;
  const unsigned char* scales;
  int gap;  // values between the two rows
  int scale_bytes;
  float unit;  // FP8: the scale of the last block, which sums are in units of

  DEVICE void point(const Weights& w, int row0) {
    const int part = threadIdx.x % 4, blocks = w.columns / 128, row = min(row0 + int(threadIdx.x) % 32 / 4, w.rows - 1);
    gap = (min(row0 + int(threadIdx.x) % 32 / 4 + 8, w.rows - 1) - row) * w.columns;
    scale_bytes = w.scale_bytes;
    unit = 0.f;
    codes = w.codes + long(row) * blocks * (64 * LOADS<F>) + 16 * part;
    if (F == Format::FP4) scales = w.scales + long(row) * blocks * 4 + part;
    if (IS_FP8<F>) scales = w.scales + long(row / 128) * blocks * scale_bytes;
  }

  DEVICE void load(RawBlock<F>& raw, int block) const {
    const unsigned char* at = codes + long(block) * (64 * LOADS<F>);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* row = at + half * long(gap / 2 * LOADS<F>);
#pragma unroll
      for (int j = 0; j < LOADS<F>; ++j) raw.codes[half][j] = load16_once(row + j * 64);
      if (F == Format::FP4) raw.scale[half] = scales[half * (gap / 32) + 4 * block];
    }
    if (IS_FP8<F>) {
      raw.scale[0] = scale_bytes == 1 ? scales[block] : reinterpret_cast<const unsigned*>(scales)[block];
    }
  }

  DEVICE float scale(const RawBlock<F>& raw) const {
    return scale_bytes == 1 ? decode_e8m0(static_cast<unsigned char>(raw.scale[0])) : __uint_as_float(raw.scale[0]);
  }
};

DEVICE unsigned word_of(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Number of the eight channels that are piece i of lane part `part`, in a 128-wide block.
template <Format F>
DEVICE int piece_channels(int i, int part) {
  return F == Format::FP4 ? 4 * part + i : IS_FP8<F> ? 8 * (i / 2) + 2 * part + i % 2 : 4 * i + part;
}

// Piece i of the weights as bf16 pairs, in pair order.
template <Format F>
DEVICE void decode_piece(unsigned (&pairs)[4], const RawBlock<F>& raw, int half, int i) {
  if constexpr (F == Format::BF16) {
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = word_of(raw.codes[half][i], j);
  } else if constexpr (IS_FP8<F>) {
    const unsigned a = word_of(raw.codes[half][i / 2], i % 2 * 2), b = word_of(raw.codes[half][i / 2], i % 2 * 2 + 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // A byte of each on top of a half; the exponent field lands in bf16's, 120 too small.
      const unsigned top = __byte_perm(a, b, 0x4400 + j * 0x1111);
      pairs[j] = mul_bf16x2((top & 0x80008000u) | (top >> 4 & 0x07f007f0u), 0x7b807b80u);
    }
  } else {
    // Codes land 126 too small; 64 of that and the block's scale come back here, the rest at the end.
    const unsigned exponent = min(raw.scale[half] + 64u, 254u) << 7, scale = exponent | exponent << 16;
    const unsigned word = word_of(raw.codes[half][0], i);
    pairs[0] = mul_bf16x2((word << 12 & 0x80008000u) | (word << 6 & 0x01c001c0u), scale);
    pairs[1] = mul_bf16x2((word << 8 & 0x80008000u) | (word << 2 & 0x01c001c0u), scale);
    pairs[2] = mul_bf16x2((word << 4 & 0x80008000u) | (word >> 2 & 0x01c001c0u), scale);
    pairs[3] = mul_bf16x2((word & 0x80008000u) | (word >> 6 & 0x01c001c0u), scale);
  }
}

// Pairs times a float, rounded.
DEVICE void scale_pairs(unsigned (&pairs)[4], float scale) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = unpack_bf16(pairs[j]);
    pairs[j] = pack_bf16(pair.x * scale, pair.y * scale);
  }
}

// Products of one 128-wide block, added to sums (the mma's fragments: token 8n + 2 (lane % 4) + i % 2, row lane / 4 +
// 8 (i / 2)). `piece_of(n, i)` loads piece i of token 8n + lane / 4.
template <Format F, int M, int NT, class PieceOf>
DEVICE void multiply_block(float (&sums)[M][NT][4], const RawBlock<F> (&raw)[M], const RowsLane<F> (&from)[M],
                           PieceOf piece_of) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned low[M][4], high[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      unsigned a[4], b[4];
      decode_piece<F>(a, raw[m], 0, i);
      decode_piece<F>(b, raw[m], 1, i);
      if constexpr (F == Format::FP8_ROUNDED) {
        scale_pairs(a, from[m].scale(raw[m]));
        scale_pairs(b, from[m].scale(raw[m]));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        low[m][2 * j] = a[j], low[m][2 * j + 1] = b[j];
        high[m][2 * j] = a[2 + j], high[m][2 * j + 1] = b[2 + j];
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 x = piece_of(n, i);
      const unsigned first[2] = {x.x, x.y}, second[2] = {x.z, x.w};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_bf16(sums[m][n], low[m], first);
        mma_bf16(sums[m][n], high[m], second);
      }
    }
  }
}

template <int NT>
DEVICE void scale_sums(float (&sums)[NT][4], float factor) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] *= factor;
  }
}

// Whether sums of FP8 are in units of the last block's scale: one set of sums, where adding up each block apart takes
// two. Few sums are cheaper apart.
template <Format F, int NT>
constexpr bool IN_UNITS = F == Format::FP8 && NT > 1;

// Add the products of one block with their scale. Blocks with scale 0 add nothing.
template <Format F, int M, int NT, class PieceOf>
DEVICE void add_block(float (&sums)[M][NT][4], RawBlock<F> (&raw)[M], RowsLane<F> (&from)[M], PieceOf piece_of) {
  if constexpr (F == Format::FP8 && !IN_UNITS<F, NT>) {
    float block[M][NT][4] = {};
    multiply_block<F, M, NT>(block, raw, from, piece_of);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float scale = from[m].scale(raw[m]);
#pragma unroll
      for (int i = 0; i < 4 * NT; ++i) sums[m][i / 4][i % 4] += block[m][i / 4][i % 4] * scale;
    }
    return;
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if constexpr (IN_UNITS<F, NT>) {
      const float scale = from[m].scale(raw[m]);
      if (scale == 0.f) {
        for (int i = 0; i < 4; ++i) raw[m].codes[i / 2][i % 2] = make_uint4(0, 0, 0, 0);
      } else if (scale != from[m].unit) {
        scale_sums<NT>(sums[m], from[m].unit / scale);
        from[m].unit = scale;
      }
    }
  }
  multiply_block<F, M, NT>(sums, raw, from, piece_of);
}

// Sums as they are meant.
template <Format F, int M, int NT>
DEVICE void finish_sums(float (&sums)[M][NT][4], const RowsLane<F> (&from)[M]) {
  if constexpr (IN_UNITS<F, NT> || F == Format::FP4) {
#pragma unroll
    for (int m = 0; m < M; ++m) scale_sums<NT>(sums[m], F == Format::FP8 ? from[m].unit : FP4_TOO_SMALL);
  }
}

// Add to sums the products of rows (of token 8n + lane / 4) with 16 rows of M matrices, over the
// 128-wide blocks first, first + step, ... below `blocks`. AHEAD of them are under way to registers; `ready` runs when
// the first are on their way, and may set the rows. FP4 sums are FP4_TOO_SMALL times too small.
template <Format F, int AHEAD, int M, int NT, class Ready>
DEVICE void multiply_few(float (&sums)[M][NT][4], RowsLane<F> (&from)[M], const bf16* const (&rows)[NT],
                         int first, int step, int blocks, Ready ready) {
  RawBlock<F> raw[AHEAD][M];
#pragma unroll
  for (int d = 0; d < AHEAD; ++d) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (first + d * step < blocks) from[m].load(raw[d][m], first + d * step);
    }
  }
  ready();
  const int part = threadIdx.x % 4;
#pragma unroll 1
  for (int base = first; base < blocks; base += AHEAD * step) {
#pragma unroll
    for (int d = 0; d < AHEAD; ++d) {
      const int block = base + d * step, next = block + AHEAD * step;
      if (block >= blocks) break;
      add_block<F, M, NT>(sums, raw[d], from, [&](int n, int i) {
        return load16(rows[n] + block * 128 + 8 * piece_channels<F>(i, part));
      });
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (next < blocks) from[m].load(raw[d][m], next);
      }
    }
  }
  finish_sums<F, M, NT>(sums, from);
}

// ---- 64 rows, in shared memory two blocks at a time ----

constexpr int TILE_ROWS = 64, TILE_WARPS = 8;
constexpr int TILE_STRIDE = 160;  // bf16 of a row's block and padding: neighbouring rows do not share banks
constexpr int TILE_BYTES = TILE_ROWS * TILE_STRIDE * 2;

// Begin to copy block number `block` of the 64 rows; each of 256 threads has four rows, 16 apart. Pieces
// are placed as they are read: piece i of the four parts together.
template <Format F>
DEVICE void copy_tile(bf16* to, const bf16* const (&rows)[4], int block) {
  const int i = threadIdx.x % 16 / 4, part = threadIdx.x % 4, row = threadIdx.x / 16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    cp_async16(to + (row + 16 * j) * TILE_STRIDE + 8 * (4 * i + part),
               rows[j] + block * 128 + 8 * piece_channels<F>(i, part));
  }
  cp_async_commit();
}

// Add to sums (zero, but for BF16) the products of 64 rows with 16 rows of two matrices per warp, over all blocks.
// Shared memory: 2 * TILE_BYTES, free for the block at the end.
template <Format F>
DEVICE void multiply_tile(float (&sums)[2][8][4], RowsLane<F> (&from)[2], const bf16* const (&rows)[4], int blocks) {
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  const int lane = threadIdx.x % 32;
  RawBlock<F> raw[2], next[2];
  from[0].load(raw[0], 0);
  from[1].load(raw[1], 0);
  copy_tile<F>(shared, rows, 0);
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<0>();
    __syncthreads();
    const bool more = block + 1 < blocks;
    if (more) {
      copy_tile<F>(shared + (block + 1) % 2 * (TILE_BYTES / 2), rows, block + 1);
      from[0].load(next[0], block + 1);
      from[1].load(next[1], block + 1);
    }
    const bf16* mine = shared + block % 2 * (TILE_BYTES / 2) + lane / 4 * TILE_STRIDE + lane % 4 * 8;
    add_block<F, 2, 8>(sums, raw, from, [&](int n, int i) { return load16(mine + 8 * n * TILE_STRIDE + 32 * i); });
    raw[0] = next[0];
    raw[1] = next[1];
  }
  finish_sums<F, 2, 8>(sums, from);
  __syncthreads();
}
