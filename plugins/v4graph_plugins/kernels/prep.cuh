// Queries and the shared key/value before attention: norm, rotation, FP8 rounding. Source: spec section 2.2.
#pragma once
#include "rounding.cuh"

constexpr int MOST_PARTS = 2;  // 256 channels each: head_dim up to 512

// A row of up to 512 channels in a warp: lane l holds channels 8l .. 8l+7 of every 256.
struct Row {
  Floats8 part[MOST_PARTS];
};

DEVICE int channel(int part) { return part * 256 + threadIdx.x % 32 * 8; }

DEVICE void norm_row(Row& row, const bf16* weight, int width, float eps) {
  float square = 0.f;
#pragma unroll
  for (int p = 0; p < MOST_PARTS; ++p) {
    for (int i = 0; i < 8; ++i) square += row.part[p].v[i] * row.part[p].v[i];
  }
  const float scale = rsqrtf(warp_sum(square) / width + eps);
#pragma unroll
  for (int p = 0; p < MOST_PARTS; ++p) {
    const bool gained = weight && channel(p) < width;
    const Floats8 gain = unpack8(gained ? load16(weight + channel(p)) : make_uint4(0, 0, 0, 0));
    for (int i = 0; i < 8; ++i) {
      const float v = row.part[p].v[i] * scale;
      row.part[p].v[i] = round_bf16(gained ? v * gain.v[i] : v);
    }
  }
}

// Rotate the last 2 F of `width` channels, and round.
DEVICE void rotate_row(Row& row, const float* freqs, int F, int width, int position) {
#pragma unroll
  for (int p = 0; p < MOST_PARTS; ++p) {
    const int first = channel(p) - (width - 2 * F);
    if (first < 0 || channel(p) >= width) continue;
    for (int i = 0; i < 8; i += 2) {
      rotate(row.part[p].v[i], row.part[p].v[i + 1], position, freqs[(first + i) / 2]);
    }
    for (int i = 0; i < 8; ++i) row.part[p].v[i] = round_bf16(row.part[p].v[i]);
  }
}

// FP8 in blocks of 64 channels, eight lanes each, but for the rotated ones.
DEVICE void round_row(Row& row, int plain) {
#pragma unroll
  for (int p = 0; p < MOST_PARTS; ++p) {
    float amax = 0.f;
    for (int i = 0; i < 8; ++i) amax = fmaxf(amax, fabsf(row.part[p].v[i]));
    for (int offset = 4; offset; offset >>= 1) amax = fmaxf(amax, __shfl_xor_sync(FULL, amax, offset));
    if (channel(p) >= plain) continue;
    const float scale = fp8_scale(amax);
    for (int i = 0; i < 8; ++i) row.part[p].v[i] = fake_fp8(row.part[p].v[i], scale);
  }
}

struct Prep {
  const bf16 *q, *kv, *kv_norm;
  const float* freqs;
  const int* start;
  bf16 *q_out, *kv_out;
  int rows, S, H, Dh, F, quantise;
  float eps;
};

// A warp takes one row: the heads of a token, then its key/value.
DEVICE void prepare_row(const Prep& p, long index) {
  if (index >= p.rows) return;
  const long token = index / (p.H + 1);
  const int head = static_cast<int>(index % (p.H + 1));
  const bool is_query = head < p.H;
  const long offset = is_query ? (token * p.H + head) * p.Dh : token * p.Dh;
  const bf16* from = (is_query ? p.q : p.kv) + offset;
  bf16* to = (is_query ? p.q_out : p.kv_out) + offset;
  Row row;
#pragma unroll
  for (int i = 0; i < MOST_PARTS; ++i) {
    row.part[i] = unpack8(channel(i) < p.Dh ? load16(from + channel(i)) : make_uint4(0, 0, 0, 0));
  }
  norm_row(row, is_query ? nullptr : p.kv_norm, p.Dh, p.eps);
  rotate_row(row, p.freqs, p.F, p.Dh, p.start[token / p.S] + static_cast<int>(token % p.S));
  if (!is_query && p.quantise) round_row(row, p.Dh - 2 * p.F);
#pragma unroll
  for (int i = 0; i < MOST_PARTS; ++i) {
    if (channel(i) < p.Dh) store16(to + channel(i), pack8(row.part[i]));
  }
}
