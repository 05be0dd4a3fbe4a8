// The compressor by itself. Source: spec section 2.3.
#include "compress.cuh"

V4_KERNEL(v4_compress, 512, 2, const float* kv, const float* gate, const float* ape, const bf16* norm,
          const float* freqs, const int* start, const int* num, float* tail_kv, float* tail_gate, bf16* cache,
          int entries, int closing, int S, int C, int CC, int R, int L, int N, int F, int overlap, int quantise,
          float eps) {
  const Compressor c{kv,    gate, ape, norm, freqs, start, num, tail_kv, tail_gate, cache,   S,
                     C,     CC,   R,   L,    N,     F,     overlap, quantise, eps};
  compress_or_write(c, blockIdx.x, entries, closing);
}
