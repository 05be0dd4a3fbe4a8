// Pairs of a right kernel and one with a mistake, for the emulator to tell apart.
#include "device.cuh"

// out[0] = sum of 128 numbers. Shared memory: 128 floats.
template <bool BARRIER>
DEVICE void block_total(const float* from, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = from[threadIdx.x];
  if (BARRIER) __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < 128; ++i) sum += shared[(threadIdx.x + i) % 128];
  if (threadIdx.x == 77) out[0] = sum;
}
V4_KERNEL(v4_right_barrier, 128, 1, const float* from, float* out) { block_total<true>(from, out); }
V4_KERNEL(v4_wrong_barrier, 128, 1, const float* from, float* out) { block_total<false>(from, out); }

// out[i] = from[i] for 32 numbers, through shared memory in two groups of copies; PENDING may be in flight when read.
template <int PENDING>
DEVICE void copy_through(const float* from, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x < 4) cp_async16(shared + 4 * threadIdx.x, from + 4 * threadIdx.x);
  cp_async_commit();
  if (threadIdx.x < 4) cp_async16(shared + 16 + 4 * threadIdx.x, from + 16 + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<PENDING>();
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}
V4_KERNEL(v4_right_wait, 32, 1, const float* from, float* out) { copy_through<0>(from, out); }
V4_KERNEL(v4_wrong_wait, 32, 1, const float* from, float* out) { copy_through<1>(from, out); }

V4_KERNEL(v4_right_index, 32, 1, const float* from, float* out) { out[threadIdx.x] = from[threadIdx.x]; }
V4_KERNEL(v4_wrong_index, 32, 1, const float* from, float* out) { out[threadIdx.x] = from[threadIdx.x + 1]; }

template <int OFFSET>
DEVICE void through_shared(const float* from, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x + OFFSET] = from[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x + OFFSET];
}
V4_KERNEL(v4_right_shared, 32, 1, const float* from, float* out) { through_shared<0>(from, out); }
V4_KERNEL(v4_wrong_shared, 32, 1, const float* from, float* out) { through_shared<1>(from, out); }

V4_KERNEL(v4_right_divergence, 64, 1, const float* from, float* out) {
  __syncthreads();
  out[threadIdx.x % 32] = from[threadIdx.x % 32];
}
V4_KERNEL(v4_wrong_divergence, 64, 1, const float* from, float* out) {
  out[threadIdx.x % 32] = from[threadIdx.x % 32];
  if (threadIdx.x < 40) __syncthreads();
  __syncwarp();
}

V4_KERNEL(v4_right_shuffle, 32, 1, const float* from, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(FULL, __shfl_xor_sync(FULL, from[threadIdx.x], 1), 1);
}
V4_KERNEL(v4_wrong_shuffle, 32, 1, const float* from, float* out) {
  float value = from[threadIdx.x];
  if (threadIdx.x < 16) value = __shfl_xor_sync(FULL, value, 1);
  out[threadIdx.x] = value;
}

V4_KERNEL(v4_right_alignment, 32, 1, const float* from, float* out) {
  if (threadIdx.x < 8) store16(out + threadIdx.x * 4, load16(from + threadIdx.x * 4));
}
V4_KERNEL(v4_wrong_alignment, 32, 1, const float* from, float* out) {
  if (threadIdx.x < 7) store16(out + threadIdx.x * 4, load16(from + threadIdx.x * 4 + 1));
}

V4_KERNEL(v4_right_start, 32, 1, const float* from, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = 0.f;
  out[threadIdx.x] = from[threadIdx.x] + shared[threadIdx.x];
}
V4_KERNEL(v4_wrong_start, 32, 1, const float* from, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  out[threadIdx.x] = from[threadIdx.x] + shared[threadIdx.x];
}
