// The CUDA side of device.cuh: sm_80 and newer.
#pragma once
#include <cuda_bf16.h>
#include <math_constants.h>

#define DEVICE __device__ __forceinline__
#define V4_KERNEL(name, threads, blocks_per_sm, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name(__VA_ARGS__)

using bf16 = __nv_bfloat16;

// Dynamic shared memory of the block, 128-byte aligned.
DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char v4_shared[];
  return v4_shared;
}

DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
DEVICE bf16 to_bf16(float value) { return __float2bfloat16_rn(value); }

// Two bf16 in one word, the first in the low half.
DEVICE unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
DEVICE float2 unpack_bf16(unsigned word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
// Products of the two halves, rounded to bf16.
DEVICE unsigned mul_bf16x2(unsigned a, unsigned b) {
  unsigned d;
  asm("{.reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 %0, %1, %2, z;}" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// 1 / value to one ulp, in one instruction; subnormals are zeros.
DEVICE float approximate_reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// d += a * b for one warp: a is 16x16 (row), b is 16x8 (column), d is 16x8. Fragments as in the PTX manual.
DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if __CUDA_ARCH__ >= 890
#define V4_HAS_E4M3 1
// d += a * b for one warp: a is 16x32 (row), b is 32x8 (column), both e4m3.
DEVICE void mma_e4m3_native(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
#define V4_HAS_E4M3 0
DEVICE void mma_e4m3_native(float (&)[4], const unsigned (&)[4], const unsigned (&)[2]) {}
#endif

// Four 8x8 matrices of 16-bit values: lane i gives the address of row i % 8 of matrix i / 8 in shared memory.
DEVICE void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Copy 16 bytes to shared memory in the background; zeros where not `valid` (the source is not read then).
DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most N of this thread's groups are in flight.
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Read once, kept out of the way of data that is read again: weights.
DEVICE uint4 load16_once(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}
