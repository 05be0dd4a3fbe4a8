// A few rows times 16 rows of each of one or two weight matrices on tensor cores, for one warp, from memory to
// registers. tiles.cuh has many rows.
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
// `matrix` of them lie before it, without gaps; 64 GB of codes at most.
struct Weights {
  const unsigned char* codes;
  const unsigned char* scales;
  int scale_bytes, rows, columns;
  int matrix = 0;
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
// Addresses are numbers beside the tensor's, which costs no registers.
template <Format F>
struct RowsLane {
  const unsigned char* codes;
  const unsigned char* scales;
  unsigned at, gap;   // 16-byte pieces of the codes before the lane's, and from its row to the other
  unsigned scale_at;  // FP8: scales before the row's
  int scale_bytes;
  float unit;       // FP8: the scale of the last block, which sums are in units of
  unsigned unpack;  // FP8: 2^120 twice, which decoding multiplies with; 0 where a block counts as zeros

  DEVICE void point(const Weights& w, int row0) {
    const int lane = threadIdx.x % 32, row = min(row0 + lane / 4, w.rows - 1), pieces = w.columns / 32 * LOADS<F>;
    codes = w.codes;
    scales = w.scales;
    gap = (min(row0 + lane / 4 + 8, w.rows - 1) - row) * pieces;
    at = (unsigned(w.matrix) * w.rows + row) * pieces + lane % 4;
    scale_at = (unsigned(w.matrix) * ((w.rows + 127) / 128) + row / 128) * (w.columns / 128);
    scale_bytes = w.scale_bytes;
    unit = 0.f;
    unpack = 0x7b807b80u;
  }

  // Address of the codes of a block in row lane / 4 or, half 1, 8 further on; others lie 64 bytes apart.
  DEVICE const unsigned char* place(int block, int half) const {
    return codes + 16ul * (at + block * (4 * LOADS<F>) + half * gap);
  }

  DEVICE void load_scale(RawBlock<F>& raw, int block) const {
    if (F == Format::FP4) {  // one for 32 codes, which are 16 bytes
      raw.scale[0] = scales[at + 4 * block];
      raw.scale[1] = scales[at + 4 * block + gap];
    } else if (IS_FP8<F>) {
      const unsigned i = scale_at + block;
      raw.scale[0] = scale_bytes == 1 ? scales[i] : reinterpret_cast<const unsigned*>(scales)[i];
    }
  }

  DEVICE void load(RawBlock<F>& raw, int block) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < LOADS<F>; ++j) raw.codes[half][j] = load16_once(place(block, half) + j * 64);
    }
    load_scale(raw, block);
  }

  // Block 0 is the next one from now on.
  DEVICE void advance() {
    at += 4 * LOADS<F>;
    ++scale_at;
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
DEVICE void decode_piece(unsigned (&pairs)[4], const RawBlock<F>& raw, int half, int i, unsigned unpack) {
  if constexpr (F == Format::BF16) {
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = word_of(raw.codes[half][i], j);
  } else if constexpr (IS_FP8<F>) {
    const unsigned a = word_of(raw.codes[half][i / 2], i % 2 * 2), b = word_of(raw.codes[half][i / 2], i % 2 * 2 + 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // A byte of each on top of a half; the exponent field lands in bf16's, 120 too small.
      const unsigned top = __byte_perm(a, b, 0x4400 + j * 0x1111);
      pairs[j] = mul_bf16x2((top & 0x80008000u) | (top >> 4 & 0x07f007f0u), unpack);
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
// 8 (i / 2)). `piece_of(n, i)` loads piece i of token 8n + lane / 4; `fetch(i)` brings the codes of piece i to `raw`
// where they are not there yet.
template <Format F, int M, int NT, class PieceOf, class Fetch>
DEVICE void multiply_block(float (&sums)[M][NT][4], const RawBlock<F> (&raw)[M], const RowsLane<F> (&from)[M],
                           PieceOf piece_of, Fetch fetch) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    fetch(i);
    unsigned low[M][4], high[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      unsigned a[4], b[4];
      decode_piece<F>(a, raw[m], 0, i, from[m].unpack);
      decode_piece<F>(b, raw[m], 1, i, from[m].unpack);
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
template <Format F, int M, int NT, class PieceOf, class Fetch>
DEVICE void add_block(float (&sums)[M][NT][4], const RawBlock<F> (&raw)[M], RowsLane<F> (&from)[M], PieceOf piece_of,
                      Fetch fetch) {
  if constexpr (F == Format::FP8 && !IN_UNITS<F, NT>) {
    float block[M][NT][4] = {};
    multiply_block<F, M, NT>(block, raw, from, piece_of, fetch);
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
      from[m].unpack = scale == 0.f ? 0u : 0x7b807b80u;
      if (scale != 0.f && scale != from[m].unit) {
        scale_sums<NT>(sums[m], from[m].unit / scale);
        from[m].unit = scale;
      }
    }
  }
  multiply_block<F, M, NT>(sums, raw, from, piece_of, fetch);
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
      const auto piece_of = [&](int n, int i) {
        return load16(rows[n] + block * 128 + 8 * piece_channels<F>(i, part));
      };
      add_block<F, M, NT>(sums, raw[d], from, piece_of, [](int) {});
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (next < blocks) from[m].load(raw[d][m], next);
      }
    }
  }
  finish_sums<F, M, NT>(sums, from);
}
