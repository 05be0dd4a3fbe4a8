// RMSNorm of one token a block. Source: spec section 2.0.
#include "device.cuh"

// Shared memory: 32 floats.
V4_KERNEL(v4_rms_norm, 128, 8, const bf16* x, const bf16* weight, bf16* y, int D, float eps) {
  const long row = long(blockIdx.x) * D;
  float square = 0.f;
  for (int column = threadIdx.x * 8; column < D; column += blockDim.x * 8) {
    const Floats8 v = unpack8(load16(x + row + column));
    for (int i = 0; i < 8; ++i) square += v.v[i] * v.v[i];
  }
  const float scale = rsqrtf(block_sum(square, reinterpret_cast<float*>(shared_memory())) / D + eps);
  for (int column = threadIdx.x * 8; column < D; column += blockDim.x * 8) {
    Floats8 v = unpack8(load16(x + row + column));
    const Floats8 gain = unpack8(load16(weight + column));
    for (int i = 0; i < 8; ++i) v.v[i] = v.v[i] * scale * gain.v[i];
    store16(y + row + column, pack8(v));
  }
}
