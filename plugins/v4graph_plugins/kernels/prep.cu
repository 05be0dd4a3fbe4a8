// Queries and the shared key/value before attention, alone and with the compressors. Source: spec sections 2.2, 2.3.
#include "compress.cuh"
#include "prep.cuh"

V4_KERNEL(v4_attention_prep, 128, 8, const bf16* q, const bf16* kv, const bf16* kv_norm, const float* freqs,
          const int* start, bf16* q_out, bf16* kv_out, int rows, int S, int H, int Dh, int F, int quantise, float eps) {
  prepare_row({q, kv, kv_norm, freqs, start, q_out, kv_out, rows, S, H, Dh, F, quantise, eps},
              long(blockIdx.x) * 4 + threadIdx.x / 32);
}

#define V4_COMPRESSOR(p)                                                                                          \
  const float *p##kv, const float *p##gate, const float *p##ape, const bf16 *p##norm, float *p##tail_kv,          \
      float *p##tail_gate, bf16 *p##cache, int p##C, int p##CC

// Blocks: 16 rows each of the queries and key/values, then those of `compress_or_write` for each compressor in turn.
V4_KERNEL(v4_hca_prep, 512, 2, const bf16* q, const bf16* kv, const bf16* kv_norm, const float* freqs,
          const int* start, const int* num, bf16* q_out, bf16* kv_out, int rows, int H, int Dh, V4_COMPRESSOR(c_),
          int entries, int closing, int S, int R, int L, int N, int F, float eps) {
  const int prepared = (rows + 15) / 16, block = blockIdx.x;
  if (block < prepared) {
    prepare_row({q, kv, kv_norm, freqs, start, q_out, kv_out, rows, S, H, Dh, F, 1, eps},
                long(block) * 16 + threadIdx.x / 32);
    return;
  }
  const Compressor main{c_kv, c_gate, c_ape, c_norm, freqs, start, num, c_tail_kv, c_tail_gate, c_cache, S,
                        c_C,  c_CC,   R,     L,      N,     F,     0,   1,         eps};
  compress_or_write(main, block - prepared, entries, closing);
}

V4_KERNEL(v4_csa_prep, 512, 2, const bf16* q, const bf16* kv, const bf16* kv_norm, const float* freqs,
          const int* start, const int* num, bf16* q_out, bf16* kv_out, int rows, int H, int Dh, V4_COMPRESSOR(c_),
          V4_COMPRESSOR(i_), int entries, int closing, int tails, int S, int R, int L, int N, int F, float eps) {
  const int prepared = (rows + 15) / 16, block = blockIdx.x;
  if (block < prepared) {
    prepare_row({q, kv, kv_norm, freqs, start, q_out, kv_out, rows, S, H, Dh, F, 1, eps},
                long(block) * 16 + threadIdx.x / 32);
    return;
  }
  const int index = block - prepared;
  const bool is_main = index < entries + tails;
  const Compressor main{c_kv, c_gate, c_ape, c_norm, freqs, start, num, c_tail_kv, c_tail_gate, c_cache, S,
                        c_C,  c_CC,   R,     L,      N,     F,     1,   1,         eps};
  const Compressor keys{i_kv, i_gate, i_ape, i_norm, freqs, start, num, i_tail_kv, i_tail_gate, i_cache, S,
                        i_C,  i_CC,   R,     L,      N,     F,     1,   2,         eps};
  compress_or_write(is_main ? main : keys, is_main ? index : index - entries - tails, entries, closing);
}
