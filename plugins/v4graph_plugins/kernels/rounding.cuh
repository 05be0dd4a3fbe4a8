// Quantisers, weight decoding and rotations: the device twin of v4graph/ops/rounding.py and positional.py.
#pragma once
#include "device.cuh"

constexpr float E4M3_MAX = 448.f;
constexpr float E2M1_MAX = 6.f;

// Smallest power of two that is not below `value` (normal, positive).
DEVICE float power_of_two_at_least(float value) {
  return __uint_as_float((__float_as_uint(value) + 0x7fffffu) & 0xff800000u);
}

// Nearest e4m3 value, ties to even; |value| <= 448.
DEVICE float round_e4m3(float value) {
  if (fabsf(value) < 0.015625f) return rintf(value * 512.f) * (1.f / 512.f);  // subnormals: steps of 2^-9
  const unsigned bits = __float_as_uint(value);
  return __uint_as_float((bits + 0x7ffffu + (bits >> 20 & 1u)) & 0xfff00000u);
}

// Scale of a block whose largest magnitude is `amax`, as FakeFP8 has it.
DEVICE float fp8_scale(float amax) { return power_of_two_at_least(fmaxf(amax, 1e-4f) * (1.f / E4M3_MAX)); }

// Value rounded to e4m3 under a power-of-two scale, and back.
DEVICE float fake_fp8(float value, float scale) {
  return round_e4m3(fminf(fmaxf(value / scale, -E4M3_MAX), E4M3_MAX)) * scale;
}

DEVICE float fp4_scale(float amax) {
  return power_of_two_at_least(fmaxf(amax, E2M1_MAX * 1.17549435e-38f) * (1.f / E2M1_MAX));
}

// Value rounded to e2m1 under a power-of-two scale, and back.
DEVICE float fake_fp4(float value, float scale) {
  const float y = fminf(fmaxf(value / scale, -E2M1_MAX), E2M1_MAX), size = fabsf(y);
  const float step = size < 2.f ? 0.5f : size < 4.f ? 1.f : 2.f;
  return rintf(y / step) * step * scale;
}

// Value of an e8m0 byte; 255 is NaN and never stored.
DEVICE float decode_e8m0(unsigned char code) { return __uint_as_float(code ? unsigned(code) << 23 : 0x00400000u); }

// The same as two equal bf16 in one word.
DEVICE unsigned decode_e8m0_bf16x2(unsigned char code) {
  const unsigned bits = code ? unsigned(code) << 7 : 0x0040u;
  return bits | bits << 16;
}

// Scale number `i` of a scale tensor that holds e8m0 bytes (1 byte) or float32 (4 bytes).
DEVICE float decode_scale(const void* scales, long i, int item_bytes) {
  return item_bytes == 1 ? decode_e8m0(static_cast<const unsigned char*>(scales)[i])
                         : static_cast<const float*>(scales)[i];
}

// Four e4m3 bytes to four bf16 (exact): bytes 0 and 1 in `low`, 2 and 3 in `high`.
DEVICE void decode_e4m3(unsigned word, unsigned& low, unsigned& high) {
  const unsigned a = (word & 0xffu) | (word & 0xff00u) << 8, b = (word >> 16 & 0xffu) | (word >> 8 & 0xff0000u);
  // The exponent field lands in bf16's, 120 too small; subnormals become bf16 subnormals, which multiply exactly.
  low = mul_bf16x2((a & 0x00800080u) << 8 | (a & 0x007f007fu) << 4, 0x7b807b80u);
  high = mul_bf16x2((b & 0x00800080u) << 8 | (b & 0x007f007fu) << 4, 0x7b807b80u);
}

// Eight e2m1 nibbles to bf16 pairs (exact, unscaled), in order: nibbles 0 and 1 (the low byte) in pairs[0], ...
DEVICE void decode_e2m1(unsigned word, unsigned (&pairs)[4]) {
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = word >> 8 * i;
    const unsigned x = (byte & 0xfu) | (byte & 0xf0u) << 12;
    pairs[i] = mul_bf16x2((x & 0x00080008u) << 12 | (x & 0x00070007u) << 6, 0x7e807e80u);
  }
}

// Rotate an interleaved pair by the angle of cosine c and sine s.
DEVICE void rotate_by(float& even, float& odd, float c, float s) {
  const float turned = even * c - odd * s;
  odd = even * s + odd * c;
  even = turned;
}

// Rotate an interleaved pair by position * frequency; `direction` 1, or -1 to rotate back.
DEVICE void rotate(float& even, float& odd, int position, float frequency, float direction = 1.f) {
  const float angle = static_cast<float>(position) * frequency;
  rotate_by(even, odd, cosf(angle), sinf(angle) * direction);
}

// Walsh-Hadamard transform of 128 channels and 128^-0.5; lane l holds channels 4l .. 4l+3.
DEVICE void hadamard_128(float (&v)[4]) {
  const int lane = threadIdx.x % 32;
  for (int bit = 16; bit; bit >>= 1) {
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(FULL, v[i], bit);
      v[i] = lane & bit ? other - v[i] : v[i] + other;
    }
  }
  const float a = v[0] + v[2], b = v[1] + v[3], c = v[0] - v[2], d = v[1] - v[3];
  const float norm = 0.08838834764831845f;
  v[0] = (a + b) * norm;
  v[1] = (a - b) * norm;
  v[2] = (c + d) * norm;
  v[3] = (c - d) * norm;
}

// Round 128 channels to e2m1 in blocks of 32 and back; lane l holds channels 4l .. 4l+3.
DEVICE void fake_fp4_128(float (&v)[4]) {
  float amax = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
  for (int bit = 4; bit; bit >>= 1) amax = fmaxf(amax, __shfl_xor_sync(FULL, amax, bit));
  const float scale = fp4_scale(amax);
  for (int i = 0; i < 4; ++i) v[i] = fake_fp4(v[i], scale);
}
