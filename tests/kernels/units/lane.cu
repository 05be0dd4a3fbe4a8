// Single instructions, a warp each, for comparison with numpy.
#include "device.cuh"

V4_KERNEL(v4_test_mma_bf16, 32, 1, const unsigned* a, const unsigned* b, float* d) {
  const int lane = threadIdx.x;
  unsigned left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[lane * 2 + i];
  float sum[4] = {1.f, 1.f, 1.f, 1.f};
  mma_bf16(sum, left, right);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

V4_KERNEL(v4_test_mma_e4m3, 32, 1, const unsigned* a, const unsigned* b, float* d) {
  const int lane = threadIdx.x;
  unsigned left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[lane * 2 + i];
  float sum[4] = {1.f, 1.f, 1.f, 1.f};
  mma_e4m3_native(sum, left, right);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

// Shared memory: 512 bytes, four 8x8 matrices of 16-bit values.
V4_KERNEL(v4_test_ldmatrix, 32, 1, const uint4* from, unsigned* plain, unsigned* turned) {
  uint4* shared = reinterpret_cast<uint4*>(shared_memory());
  shared[threadIdx.x] = from[threadIdx.x];
  __syncwarp();
  unsigned r[4];
  ldmatrix_x4(r, shared + threadIdx.x);
  for (int i = 0; i < 4; ++i) plain[threadIdx.x * 4 + i] = r[i];
  ldmatrix_x4_trans(r, shared + threadIdx.x);
  for (int i = 0; i < 4; ++i) turned[threadIdx.x * 4 + i] = r[i];
}

V4_KERNEL(v4_test_collectives, 32, 1, const int* from, int* out) {
  const int lane = threadIdx.x, mine = from[lane];
  out[lane] = __shfl_xor_sync(FULL, mine, 5);
  out[32 + lane] = __shfl_sync(FULL, mine, 7);
  out[64 + lane] = __shfl_up_sync(FULL, mine, 3);
  out[96 + lane] = __shfl_down_sync(FULL, mine, 3);
  out[128 + lane] = static_cast<int>(__ballot_sync(FULL, mine % 2));
  out[160 + lane] = __any_sync(FULL, mine == 31) + 2 * __all_sync(FULL, mine < 31);
}
