// Window, compressed and selected attention of many tokens. Source: spec sections 2.2, 2.4, 2.5, 2.6.
//
// Grid: x = run of `run` tokens * head tiles + head tile.
#include "attention_wide.cuh"

// One token's output; TURNED for the warp whose channels are rotated back. Neighbouring lanes swap pairs of channels,
// so that four of them write 32 bytes in a row.
template <bool TURNED>
DEVICE void store_output(const Call& call, const Shared& shared, const Output& out, int index) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 64, odd = lane & 1;
  const long token = shared.first() + index;
  const float2* turns = shared.turns + index * ROTATED / 2 + lane % 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = i * 8 + lane / 4, head = shared.first_head() + row;
    const float scale = shared.last[row];
    bf16* to = call.o + (token * call.H + head) * HEAD + first + odd * 8 + (lane & 2) * 2;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      unsigned pair[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float* sum = out.sum[i / 2][n + side] + i % 2 * 2;
        const float a = sum[0] * scale, b = sum[1] * scale;
        pair[side] = TURNED ? turned_pair(a, b, turns[(n + side) * 4]) : pack_bf16(a, b);
      }
      const unsigned got = __shfl_xor_sync(FULL, odd ? pair[0] : pair[1], 1);
      const uint2 both = odd ? make_uint2(got, pair[1]) : make_uint2(pair[0], got);
      if (head < call.H) *reinterpret_cast<uint2*>(to + n * 8) = both;
    }
  }
}

// The first tiles are listed, and the very first is on its way.
DEVICE void begin_run(const Call& call, const Keys& keys, const Shared& shared, int first, int tokens,
                      int first_head) {
  const int head = first_head + threadIdx.x;
  if (threadIdx.x < HEADS) shared.sinks[threadIdx.x] = head < call.H ? call.sink[head] * LOG2E : 0.f;
  if (threadIdx.x == 0) {
    shared.block[0] = first;
    shared.block[1] = tokens;
    shared.block[2] = first_head;
  }
  __syncthreads();
  describe_run(shared, call, keys);
  __syncthreads();
  if (threadIdx.x == 0) count_tiles(shared);
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp < AHEAD) list_key(shared, keys, warp, find_key(shared, keys, warp));
  __syncthreads();
  copy_tile(shared, keys, 0);
}

DEVICE void attend_run(const Call& call, const Keys& keys, const Shared& shared) {
  Queries q;
  Output out = {};
  q.load(shared, call, 0);
  for (int number = 0; Step(shared, number).token < shared.tokens(); ++number) {
    const int warp = threadIdx.x / 32, listed = number + AHEAD + warp % AHEAD;
    const bool lists = number % AHEAD == 0 && number / AHEAD % 2 == warp / AHEAD;
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before it any more
    int key = -1;
    if (lists) key = find_key(shared, keys, listed);
    if (Step(shared, number + 1).token < shared.tokens()) copy_tile(shared, keys, number + 1);
    float4 own;
    score_tile(shared, q, number % STAGES, own);
    if (lists) list_key(shared, keys, listed, key);
    const Step step(shared, number), next(shared, number + 1);
    const bool ends = next.token > step.token;
    if (ends && next.token < shared.tokens()) q.load(shared, call, next.token);
    __syncthreads();
    softmax_tile(shared, own, number, call.scale * LOG2E, step.tile == 0);
    if (ends) finish_softmax(shared);
    __syncthreads();
    out.rescale(shared.factor);
    value_tile(shared, out, number % STAGES);
    if (!ends) continue;
    if (threadIdx.x < THREADS - 32) {
      store_output<false>(call, shared, out, step.token);
    } else {
      store_output<true>(call, shared, out, step.token);
    }
  }
}

DEVICE void attention(const Call& call, const Keys& keys, int all, int run) {
  const int head_tiles = (call.H + HEADS - 1) / HEADS, first_head = blockIdx.x % head_tiles * HEADS;
  const int first = blockIdx.x / head_tiles * run, tokens = min(run, all - first);
  if (call.write_ring && first_head == 0) {
    for (int i = 0; i < tokens; ++i) write_ring_row(call, keys, first + i);
  }
  const Shared shared(shared_memory());
  begin_run(call, keys, shared, first, tokens, first_head);
  attend_run(call, keys, shared);
}

#define V4_WIDE_ATTENTION(name, far_parameters, far_keys)                                                          \
  V4_KERNEL(name, 256, 1, const bf16* q, const bf16* kv, const float* sink, const float* freqs, const int* start, \
            const int* num, const bf16* ring, far_parameters bf16* o, bf16* ring_out, int S, int H, int L, int N, \
            int K, int window, int ratio, int write_ring, int tokens, int run, float scale) {                     \
    attention({q, sink, freqs, start, num, o, ring_out, nullptr, H, write_ring, scale},                           \
              {kv, ring, far_keys, S, L, N, K, window, ratio}, tokens, run);                                      \
  }

V4_WIDE_ATTENTION(v4_window_attention_64, , nullptr V4_COMMA nullptr)
V4_WIDE_ATTENTION(v4_compressed_attention_64, V4_CACHE, cache V4_COMMA nullptr)
V4_WIDE_ATTENTION(v4_selected_attention_64, V4_CACHE_AND_ROWS, cache V4_COMMA rows)
