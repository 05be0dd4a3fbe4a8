// The g++ side of device.cuh: a block's threads are fibres of one CPU thread, switched at every point where
// CUDA threads wait for each other. Blocks run one after the other.
//
// What it notices: shared memory is surrounded by pages that may not be touched and starts as NaNs; the order
// of the fibres comes from a seed; cp.async copies as late as it may; a barrier that not all threads reach,
// a warp collective that not all lanes reach, and misaligned accesses end the launch with a sentence.
// What it cannot notice: races that need two blocks or the memory model.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#define DEVICE inline __attribute__((always_inline))
#define V4_HAS_E4M3 (emu::state.native_e4m3)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct bf16 { unsigned short bits; };

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace emu {

struct Dim { unsigned x, y, z; };

struct Copy { void* to; const void* from; bool valid; };

struct Fibre {
  void* stack_pointer;
  unsigned thread;
  Dim index;
  bool done;
  std::vector<Copy> copies;      // cp.async not yet carried out, oldest first
  std::vector<size_t> groups;    // end of each committed group in `copies`
};

// What the lanes of a warp exchange: `kind` tells collectives apart, so that lanes meet at the same one.
struct Warp {
  unsigned arrived, alive;
  const char* kind;
  alignas(16) unsigned char in[32][32];
  alignas(16) unsigned char out[32][16];
  Fibre* waiting[32];
};

struct State {
  Dim block, grid, block_dim;
  unsigned char* shared;
  bool native_e4m3;
  std::vector<Warp> warps;
};

extern State state;
extern Fibre* current;

void fail(const char* format, ...) __attribute__((noreturn, format(printf, 1, 2)));
void barrier();
// Wait until all lanes of the warp are at a collective of this kind; the last one to arrive runs `combine`.
void collective(const char* kind, void (*combine)(Warp&));
void combine_nothing(Warp&);
void combine_mma_bf16(Warp&);
void combine_mma_e4m3(Warp&);
void combine_ldmatrix(Warp&);
void combine_ldmatrix_trans(Warp&);
void finish_copies(size_t groups_left);

inline unsigned lane() { return current->thread % 32; }
inline Warp& warp() { return state.warps[current->thread / 32]; }
inline bool aligned(const void* address, size_t to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

struct Entry {
  const char* name;
  int threads;
  std::string signature;  // one letter an argument: p pointer, i int, f float
  void (*invoke)(const void* function, void** arguments);
  const void* function;

  template <class... A>
  Entry(const char* name, int threads, void (*kernel)(A...))
      : name(name), threads(threads), signature{letter<A>()...}, function(reinterpret_cast<const void*>(kernel)) {
    invoke = [](const void* function, void** arguments) {
      auto call = reinterpret_cast<void (*)(A...)>(const_cast<void*>(function));
      [&]<size_t... I>(std::index_sequence<I...>) {
        call(*static_cast<A*>(arguments[I])...);
      }(std::index_sequence_for<A...>{});
    };
    entries().push_back(this);
  }
  static std::vector<Entry*>& entries();

 private:
  template <class T>
  static constexpr char letter() {
    static_assert(std::is_pointer_v<T> || std::is_same_v<T, int> || std::is_same_v<T, float>,
                  "kernel parameters are pointers, int or float");
    return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, int> ? 'i' : 'f';
  }
};

template <class T>
T exchange(const char* kind, T value, unsigned source) {
  static_assert(sizeof(T) <= 16);
  Warp& w = warp();
  memcpy(w.in[lane()], &value, sizeof value);
  memcpy(w.in[lane()] + 16, &source, sizeof source);
  collective(kind, [](Warp& w) {
    for (unsigned i = 0; i < 32; ++i) {
      unsigned source;
      memcpy(&source, w.in[i] + 16, sizeof source);
      memcpy(w.out[i], w.in[source & 31], 16);
    }
  });
  T result;
  memcpy(&result, w.out[lane()], sizeof result);
  return result;
}

}  // namespace emu

#define V4_KERNEL(name, threads, blocks_per_sm, ...)                   \
  static void name(__VA_ARGS__);                                       \
  static const emu::Entry v4_entry_##name{#name, threads, &name};      \
  static void name(__VA_ARGS__)

#define threadIdx (emu::current->index)
#define blockIdx (emu::state.block)
#define blockDim (emu::state.block_dim)
#define gridDim (emu::state.grid)

inline unsigned char* shared_memory() { return emu::state.shared; }
inline void __syncthreads() { emu::barrier(); }
inline void __syncwarp(unsigned = ~0u) { emu::collective("__syncwarp", emu::combine_nothing); }

template <class T>
T __shfl_sync(unsigned, T v, int source) { return emu::exchange("__shfl_sync", v, source); }
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) { return emu::exchange("__shfl_xor_sync", v, emu::lane() ^ mask); }
template <class T>
T __shfl_up_sync(unsigned, T v, unsigned by) {
  return emu::exchange("__shfl_up_sync", v, emu::lane() < by ? emu::lane() : emu::lane() - by);
}
template <class T>
T __shfl_down_sync(unsigned, T v, unsigned by) {
  return emu::exchange("__shfl_down_sync", v, emu::lane() + by > 31 ? emu::lane() : emu::lane() + by);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  emu::Warp& w = emu::warp();
  w.in[emu::lane()][0] = predicate != 0;
  emu::collective("__ballot_sync", [](emu::Warp& w) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= unsigned(w.in[i][0]) << i;
    for (unsigned i = 0; i < 32; ++i) memcpy(w.out[i], &votes, sizeof votes);
  });
  unsigned votes;
  memcpy(&votes, w.out[emu::lane()], sizeof votes);
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned x; memcpy(&x, &f, 4); return x; }
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float approximate_reciprocal(float x) { return 1.0f / x; }
inline float __frcp_rn(float x) { return 1.0f / x; }
template <class T>
T __reduce_max_sync(unsigned, T v) {
  for (int offset = 16; offset; offset >>= 1) v = std::max(v, __shfl_xor_sync(~0u, v, offset));
  return v;
}
template <class T>
T __reduce_add_sync(unsigned, T v) {
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}
using std::max;
using std::min;

// Fibres never interleave inside these.
template <class T>
T atomicAdd(T* address, T value) { T old = *address; *address = old + value; return old; }
template <class T>
T atomicMax(T* address, T value) { T old = *address; *address = std::max(old, value); return old; }
template <class T>
T atomicMin(T* address, T value) { T old = *address; *address = std::min(old, value); return old; }
template <class T>
T atomicOr(T* address, T value) { T old = *address; *address = old | value; return old; }

inline float to_float(bf16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
inline bf16 to_bf16(float value) {  // round to nearest, ties to even
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
inline unsigned pack_bf16(float low, float high) {
  return to_bf16(low).bits | unsigned(to_bf16(high).bits) << 16;
}
inline float2 unpack_bf16(unsigned word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
inline unsigned mul_bf16x2(unsigned a, unsigned b) {
  const float2 x = unpack_bf16(a), y = unpack_bf16(b);
  return pack_bf16(x.x * y.x, x.y * y.y);
}

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emu::Warp& w = emu::warp();
  unsigned char* mine = w.in[emu::lane()];
  memcpy(mine, a, 16);
  memcpy(mine + 16, b, 8);
  emu::collective("mma.m16n8k16.bf16", emu::combine_mma_bf16);
  float product[4];
  memcpy(product, w.out[emu::lane()], 16);
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}
inline void mma_e4m3_native(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emu::Warp& w = emu::warp();
  unsigned char* mine = w.in[emu::lane()];
  memcpy(mine, a, 16);
  memcpy(mine + 16, b, 8);
  emu::collective("mma.m16n8k32.e4m3", emu::combine_mma_e4m3);
  float product[4];
  memcpy(product, w.out[emu::lane()], 16);
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  if (!emu::aligned(row, 16)) emu::fail("ldmatrix: a row's address is not a multiple of 16");
  emu::Warp& w = emu::warp();
  memcpy(w.in[emu::lane()], &row, sizeof row);
  emu::collective("ldmatrix", emu::combine_ldmatrix);
  memcpy(r, w.out[emu::lane()], 16);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  if (!emu::aligned(row, 16)) emu::fail("ldmatrix.trans: a row's address is not a multiple of 16");
  emu::Warp& w = emu::warp();
  memcpy(w.in[emu::lane()], &row, sizeof row);
  emu::collective("ldmatrix.trans", emu::combine_ldmatrix_trans);
  memcpy(r, w.out[emu::lane()], 16);
}

inline void cp_async16(void* shared, const void* global, bool valid = true) {
  if (!emu::aligned(shared, 16) || !emu::aligned(global, 16)) {
    emu::fail("cp.async: an address is not a multiple of 16");
  }
  emu::current->copies.push_back({shared, global, valid});
}
inline void cp_async_commit() { emu::current->groups.push_back(emu::current->copies.size()); }
template <int N>
inline void cp_async_wait() { emu::finish_copies(N); }

inline uint4 load16_once(const void* address) { return *static_cast<const uint4*>(address); }

// Byte i of the result is byte (selector >> 4i & 7) of `low` (0 to 3) and `high` (4 to 7).
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
