// Window, compressed and selected attention. Source: spec sections 2.2, 2.4, 2.5, 2.6.
//
// Grid of the attention kernels: x = token * head tiles + head tile, y = split of the keys. With one split the block
// writes its heads' outputs; with more it leaves its sums to v4_attention_combine.
#include "attention.cuh"

struct Call {
  const bf16* q;
  const float *sink, *freqs;
  const int *start, *num;
  bf16 *o, *ring_out;
  float* partial;  // [token][split][head][HEAD + 2]: sums, then peak and total
  int H, write_ring;
  float scale;
};

constexpr int PARTIAL = HEAD + 2;
constexpr int ROTATED = 64;

// Two neighbouring channels of an output: rounded, rotated back if they are among the last 64, and rounded again.
DEVICE unsigned finished_pair(float even, float odd, int channel, int position, const float* freqs) {
  const int turned = channel - (HEAD - ROTATED);
  if (turned >= 0) {
    even = round_bf16(even);
    odd = round_bf16(odd);
    rotate(even, odd, position, freqs[turned / 2], -1.f);
  }
  return pack_bf16(even, odd);
}

// The block's position becomes the newest of its row of the ring. A chunk of S <= L - window tokens overwrites
// positions up to start + S - 1 - L <= start - window - 1, and no query of the chunk sees one below start - window + 1.
DEVICE void write_ring_row(const Call& call, const Keys& keys, long token) {
  const long batch = token / keys.S;
  const int s = static_cast<int>(token % keys.S), part = threadIdx.x * 8;
  if (s >= call.num[batch] || part >= HEAD) return;
  const int row = (call.start[batch] + s) % keys.L;
  store16(call.ring_out + (batch * keys.L + row) * HEAD + part, load16(keys.kv + token * HEAD + part));
}

template <int HM>
DEVICE void store_output(const Call& call, const Output<HM>& out, long token, int first_head, int position,
                         const float* factor) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 64 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < HM / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + lane / 4 + half * 8, head = first_head + row;
      if (head >= call.H) continue;
      const float scale = factor[row];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int channel = first + n * 8;
        const float even = out.sum[m][n][half * 2] * scale, odd = out.sum[m][n][half * 2 + 1] * scale;
        *reinterpret_cast<unsigned*>(call.o + (token * call.H + head) * HEAD + channel) =
            finished_pair(even, odd, channel, position, call.freqs);
      }
    }
  }
}

template <int HM>
DEVICE void store_partial(const Call& call, const Output<HM>& out, long token, int first_head) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 64 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < HM / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = first_head + m * 16 + lane / 4 + half * 8;
      if (head >= call.H) continue;
      float* to = call.partial + ((token * gridDim.y + blockIdx.y) * call.H + head) * PARTIAL;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        *reinterpret_cast<float2*>(to + first + n * 8) =
            make_float2(out.sum[m][n][half * 2], out.sum[m][n][half * 2 + 1]);
      }
    }
  }
}

template <int HM>
DEVICE void attention(const Call& call, const Keys& keys) {
  const int head_tiles = (call.H + HM - 1) / HM, first_head = blockIdx.x % head_tiles * HM;
  const int token = blockIdx.x / head_tiles;
  const int start = call.start[token / keys.S], position = start + token % keys.S;
  const Shared<HM> shared(shared_memory());
  const KeyList list(keys, token, start);
  const int splits = gridDim.y, tiles = (list.count + TILE - 1) / TILE;
  const int span = (tiles + splits - 1) / splits * TILE;
  const int begin = min(static_cast<int>(blockIdx.y) * span, list.count), end = min(begin + span, list.count);
  const Queries<HM> q(call.q + (long(token) * call.H + first_head) * HEAD, call.H - first_head);
  Output<HM> out = {};
  Running running;
  attend(shared, list, q, begin, end, call.scale * LOG2E, out, running);
  constexpr int SHARE = THREADS / HM;
  const int row = threadIdx.x / SHARE, head = first_head + row;
  if (call.write_ring && first_head == 0 && blockIdx.y == 0) write_ring_row(call, keys, token);
  if (splits > 1) {
    if (threadIdx.x % SHARE == 0 && head < call.H) {
      float* to = call.partial + ((long(token) * splits + blockIdx.y) * call.H + head) * PARTIAL + HEAD;
      to[0] = running.peak;
      to[1] = running.total;
    }
    store_partial(call, out, token, first_head);
    return;
  }
  __syncthreads();  // the last tile's factors have been read
  if (threadIdx.x % SHARE == 0) {
    const float sink = head < call.H ? call.sink[head] * LOG2E : 0.f;
    shared.factor[row] = 1.f / (running.total + exp2f(sink - running.peak));
  }
  __syncthreads();
  store_output(call, out, token, first_head, position, shared.factor);
}

#define V4_ATTENTION(name, HM, blocks, far_parameters, far_keys)                                                    \
  V4_KERNEL(name, 256, blocks, const bf16* q, const bf16* kv, const float* sink, const float* freqs,                \
            const int* start, const int* num, const bf16* ring, far_parameters bf16* o, bf16* ring_out,            \
            float* partial, int S, int H, int L, int N, int K, int window, int ratio, int write_ring, float scale) { \
    attention<HM>({q, sink, freqs, start, num, o, ring_out, partial, H, write_ring, scale},                        \
                  {kv, ring, far_keys, S, L, N, K, window, ratio});                                                 \
  }
#define V4_COMMA ,
#define V4_CACHE const bf16 *cache,
#define V4_CACHE_AND_ROWS const bf16 *cache, const int *rows,

V4_ATTENTION(v4_window_attention_16, 16, 2, , nullptr V4_COMMA nullptr)
V4_ATTENTION(v4_window_attention_32, 32, 1, , nullptr V4_COMMA nullptr)
V4_ATTENTION(v4_compressed_attention_16, 16, 2, V4_CACHE, cache V4_COMMA nullptr)
V4_ATTENTION(v4_compressed_attention_32, 32, 1, V4_CACHE, cache V4_COMMA nullptr)
V4_ATTENTION(v4_selected_attention_16, 16, 2, V4_CACHE_AND_ROWS, cache V4_COMMA rows)
V4_ATTENTION(v4_selected_attention_32, 32, 1, V4_CACHE_AND_ROWS, cache V4_COMMA rows)

// One block a token and head: add up the splits, in order.
V4_KERNEL(v4_attention_combine, 128, 8, const float* partial, const float* sink, const float* freqs, const int* start,
          bf16* o, int S, int H, int splits) {
  const long token = blockIdx.x / H;
  const int head = blockIdx.x % H, channel = threadIdx.x * 4;
  const float* from = partial + (token * splits * H + head) * PARTIAL;
  const long step = long(H) * PARTIAL;
  float peak = NONE;
  for (int i = 0; i < splits; ++i) peak = fmaxf(peak, from[i * step + HEAD]);
  float total = exp2f(sink[head] * LOG2E - peak), sum[4] = {};
  for (int i = 0; i < splits; ++i) {
    const float weight = exp2f(from[i * step + HEAD] - peak);
    total += weight * from[i * step + HEAD + 1];
    for (int c = 0; c < 4; ++c) sum[c] += weight * from[i * step + channel + c];
  }
  const int position = start[token / S] + static_cast<int>(token % S);
  const unsigned low = finished_pair(sum[0] / total, sum[1] / total, channel, position, freqs);
  const unsigned high = finished_pair(sum[2] / total, sum[3] / total, channel + 2, position, freqs);
  *reinterpret_cast<uint2*>(o + (token * H + head) * HEAD + channel) = make_uint2(low, high);
}

// The chunk's newest rows become the ring's: four tokens a block.
V4_KERNEL(v4_ring_update, 256, 4, const bf16* kv, const int* start, const int* num, bf16* ring, int S, int L,
          int tokens) {
  const long token = long(blockIdx.x) * 4 + threadIdx.x / 64;
  if (token >= tokens) return;
  const long batch = token / S;
  const int s = static_cast<int>(token % S), part = threadIdx.x % 64 * 8;
  if (s >= num[batch] || s < num[batch] - L) return;
  const int row = (start[batch] + s) % L;
  store16(ring + (batch * L + row) * HEAD + part, load16(kv + token * HEAD + part));
}
