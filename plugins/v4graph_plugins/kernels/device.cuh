// What kernels are written in: CUDA under nvcc, one fibre per CUDA thread under g++.
//
// A kernel uses only what is declared here (both sides declare the same), the built-in indices, and dynamic
// shared memory. Entry points are declared with V4_KERNEL(name, threads, blocks_per_sm, parameters...).
#pragma once
#ifdef __CUDACC__
#include "device_cuda.cuh"
#else
#include "emulator/emulator.h"
#endif

constexpr unsigned FULL = 0xffffffffu;  // every warp collective takes all 32 lanes
constexpr float LOG2E = 1.4426950408889634f;

template <class T>
DEVICE T warp_sum(T value) {
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(FULL, value, offset);
  return value;
}

DEVICE float warp_max(float value) {
  for (int offset = 16; offset; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL, value, offset));
  return value;
}

// Sum over the threads of a block, for all of them; `scratch` is shared memory of 32 floats.
DEVICE float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[warp] = value;
  __syncthreads();
  value = 0.f;
  for (int i = 0; i < warps; ++i) value += scratch[i];
  return value;
}

// Eight bf16 values as they lie in memory, 16 bytes.
struct Floats8 {
  float v[8];
};

DEVICE Floats8 unpack8(uint4 raw) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  Floats8 out;
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_bf16(words[i]);
    out.v[2 * i] = pair.x;
    out.v[2 * i + 1] = pair.y;
  }
  return out;
}

DEVICE uint4 pack8(const Floats8& in) {
  return make_uint4(pack_bf16(in.v[0], in.v[1]), pack_bf16(in.v[2], in.v[3]), pack_bf16(in.v[4], in.v[5]),
                    pack_bf16(in.v[6], in.v[7]));
}

// 16-byte accesses; the address must be a multiple of 16.
template <class T>
DEVICE uint4 load16(const T* address) {
  return *reinterpret_cast<const uint4*>(address);
}

template <class T>
DEVICE void store16(T* address, uint4 value) {
  *reinterpret_cast<uint4*>(address) = value;
}

// Value rounded to bf16 and back: where the reference casts to the graph's dtype.
DEVICE float round_bf16(float value) { return to_float(to_bf16(value)); }
