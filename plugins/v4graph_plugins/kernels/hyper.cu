// Hyper-connections. Source: spec section 2.1.
#include "device.cuh"

// z[k] = post[k] y + sum_j comb[j][k] x[j] for one token and eight channels a thread.
V4_KERNEL(v4_hyper_post, 128, 8, const bf16* y, const bf16* x, const float* post, const float* comb, bf16* z, int D) {
  const long token = blockIdx.y;
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (column >= D) return;
  const Floats8 out = unpack8(load16(y + token * D + column));
  Floats8 streams[4];
  for (int j = 0; j < 4; ++j) streams[j] = unpack8(load16(x + (token * 4 + j) * D + column));
  for (int k = 0; k < 4; ++k) {
    Floats8 mixed;
    for (int i = 0; i < 8; ++i) {
      float sum = 0.f;
      for (int j = 0; j < 4; ++j) sum += comb[token * 16 + j * 4 + k] * streams[j].v[i];
      mixed.v[i] = post[token * 4 + k] * out.v[i] + sum;
    }
    store16(z + (token * 4 + k) * D + column, pack8(mixed));
  }
}
