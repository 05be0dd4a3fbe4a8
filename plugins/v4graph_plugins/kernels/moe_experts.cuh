// What the expert kernels share: where an expert's matrices lie, and its activation. Source: spec section 3.
#pragma once
#include "rows.cuh"

// Matrices of one shape one after the other, an expert each; scales are not read in bf16.
struct Matrices {
  const void* codes;
  const void* scales;
  int scale_bytes;
};

DEVICE Weights expert_weights(const Matrices& m, int expert, int rows, int columns) {
  return {static_cast<const unsigned char*>(m.codes), static_cast<const unsigned char*>(m.scales), m.scale_bytes,
          rows, columns, expert};
}

// The shared expert is FP8 where the routed experts are quantised.
template <Format F>
constexpr Format ALWAYS = F == Format::BF16 ? Format::BF16 : Format::FP8;

// silu(min(gate, limit)) * clamp(value) * gain; the sigmoid as the reference spells it.
DEVICE float swiglu(float gate, float value, float gain, float limit) {
  gate = fminf(gate, limit);
  value = fminf(fmaxf(value, -limit), limit);
  return gate * (1.f / (1.f + expf(-gate))) * value * gain;
}

// Rows of one expert that a block works on: of the shared expert, whose rows are the tokens, or `count` rows from
// `first` on in expert order.
struct Tile {
  bool always;
  int expert, first, count;
};

// Tile number i: first those of the shared expert, `rows` tokens each, then those of the list, some of them empty.
DEVICE Tile pick_tile(const int4* tiles, int i, int T, int rows) {
  const int shared = (T + rows - 1) / rows;
  if (i < shared) return {true, 0, i * rows, min(rows, T - i * rows)};
  const int4 tile = tiles[i - shared];
  return {false, tile.x, tile.y, tile.z};
}

// Round `blocks` blocks of 128 values to FP8, in pair order; `from` and `to` give the address of a block's values. For
// all threads of a block.
template <class From, class To>
DEVICE void round_blocks(long blocks, From from, To to) {
  const int halves = blockDim.x / 16, channel = threadIdx.x % 16 * 8;
  for (long first = 0; first < blocks; first += halves) {
    const long block = first + threadIdx.x / 16;
    const bool there = block < blocks;
    const uint4 rounded = round_eight(there ? load16(from(block) + channel) : make_uint4(0, 0, 0, 0));
    if (there) store16(to(block) + channel, rounded);
  }
}

// Value as an expert gives it: quantised forms round to bf16.
template <Format F>
DEVICE float round_as(float value) {
  return F == Format::BF16 ? value : round_bf16(value);
}

// Inner products lie in one buffer: those of the shared expert [T, Is], then the routed ones [T * K, I]. In the float
// form a row is twice as wide: a value is the sum of two bf16, the second `width` channels further on.
template <Format F>
constexpr int PARTS = F == Format::BF16 ? 2 : 1;

template <Format F, class T>
DEVICE T* inner_row(T* inner, const Tile& tile, long row, int tokens, int I, int Is) {
  const long values = tile.always ? row * Is : long(tokens) * Is + row * I;
  return inner + values * PARTS<F>;
}

// Store one activation. Quantised forms round to bf16 where the reference does, the float form nowhere.
template <Format F>
DEVICE void store_inner(bf16* row, int column, int width, float gate, float value, float gain, float limit) {
  const float y = swiglu(round_as<F>(gate), round_as<F>(value), gain, limit), high = round_bf16(y);
  row[column] = to_bf16(high);
  if (F == Format::BF16) row[width + column] = to_bf16(y - high);
}
