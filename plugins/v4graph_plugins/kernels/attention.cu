// Window, compressed and selected attention. Source: spec sections 2.2, 2.4, 2.5, 2.6.
//
// Grid of the attention kernels: x = token * head tiles + head tile, y = split of the keys. With one split the block
// writes its heads' outputs; with more it leaves its sums to v4_attention_combine.
#include "attention.cuh"

constexpr int PARTIAL = HEAD + 2;

template <int HM>
DEVICE void store_output(const Call& call, const Output<HM>& out, long token, int first_head,
                         const Shared<HM>& shared) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 64 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < HM / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + lane / 4 + half * 8, head = first_head + row;
      if (head >= call.H) continue;
      const float scale = shared.factor[row];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int channel = first + n * 8;
        const float even = out.sum[m][n][half * 2] * scale, odd = out.sum[m][n][half * 2 + 1] * scale;
        *reinterpret_cast<unsigned*>(call.o + (token * call.H + head) * HEAD + channel) =
            finished_pair(even, odd, channel, shared.turns);
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
  const int start = call.start[token / keys.S];
  const Shared<HM> shared(shared_memory());
  const KeyList list(keys, token, start);
  const int splits = gridDim.y, tiles = (list.count + TILE - 1) / TILE;
  const int span = (tiles + splits - 1) / splits * TILE;
  const int begin = min(static_cast<int>(blockIdx.y) * span, list.count), end = min(begin + span, list.count);
  const Queries<HM> q(call.q + (long(token) * call.H + first_head) * HEAD, call.H - first_head);
  if (splits == 1 && threadIdx.x < 32) write_turns(shared.turns, call.freqs, start + token % keys.S);
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
  store_output(call, out, token, first_head, shared);
}

#define V4_ATTENTION(name, HM, blocks, far_parameters, far_keys)                                                    \
  V4_KERNEL(name, 256, blocks, const bf16* q, const bf16* kv, const float* sink, const float* freqs,                \
            const int* start, const int* num, const bf16* ring, far_parameters bf16* o, bf16* ring_out,            \
            float* partial, int S, int H, int L, int N, int K, int window, int ratio, int write_ring, float scale) { \
    attention<HM>({q, sink, freqs, start, num, o, ring_out, partial, H, write_ring, scale},                        \
                  {kv, ring, far_keys, S, L, N, K, window, ratio});                                                 \
  }

V4_ATTENTION(v4_window_attention_16, 16, 2, , nullptr V4_COMMA nullptr)
V4_ATTENTION(v4_window_attention_32, 32, 1, , nullptr V4_COMMA nullptr)
V4_ATTENTION(v4_compressed_attention_16, 16, 2, V4_CACHE, cache V4_COMMA nullptr)
V4_ATTENTION(v4_compressed_attention_32, 32, 1, V4_CACHE, cache V4_COMMA nullptr)
V4_ATTENTION(v4_selected_attention_16, 16, 2, V4_CACHE_AND_ROWS, cache V4_COMMA rows)
V4_ATTENTION(v4_selected_attention_32, 32, 1, V4_CACHE_AND_ROWS, cache V4_COMMA rows)

// Splits whose sums a thread asks for at once: one after the other they would cost as many latencies.
constexpr int AT_ONCE = 8;

// Add four channels of the splits base .. base + 31, whose weights the lanes hold.
DEVICE void add_splits(const float* from, long step, int splits, float weight, float (&sum)[4]) {
  for (int i = 0; i < min(splits, 32); i += AT_ONCE) {
    float2 part[AT_ONCE][2];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const float2* at = reinterpret_cast<const float2*>(from + (i + j) * step);
      part[j][0] = i + j < splits ? at[0] : make_float2(0.f, 0.f);
      part[j][1] = i + j < splits ? at[1] : make_float2(0.f, 0.f);
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const float w = __shfl_sync(FULL, weight, i + j);
      sum[0] += w * part[j][0].x, sum[1] += w * part[j][0].y;
      sum[2] += w * part[j][1].x, sum[3] += w * part[j][1].y;
    }
  }
}

// One block a token and head: add up the splits, in order.
V4_KERNEL(v4_attention_combine, 128, 8, const float* partial, const float* sink, const float* freqs, const int* start,
          bf16* o, int S, int H, int splits) {
  const long token = blockIdx.x / H, step = long(H) * PARTIAL;
  const int head = blockIdx.x % H, channel = threadIdx.x * 4, lane = threadIdx.x % 32;
  const float* from = partial + (token * splits * H + head) * PARTIAL;
  float peak = NONE, total = 0.f, sum[4] = {};
  for (int i = lane; i < splits; i += 32) peak = fmaxf(peak, from[i * step + HEAD]);
  peak = warp_max(peak);
  for (int i = lane, base = 0; base < splits; i += 32, base += 32) {
    const float weight = i < splits ? exp2f(from[i * step + HEAD] - peak) : 0.f;
    if (i < splits) total += weight * from[i * step + HEAD + 1];
    add_splits(from + base * step + channel, step, splits - base, weight, sum);
  }
  total = warp_sum(total) + exp2f(sink[head] * LOG2E - peak);
  unsigned pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int turned = (channel - (HEAD - ROTATED)) / 2 + i;
    const float even = sum[i * 2] / total, odd = sum[i * 2 + 1] / total;
    const int position = start[token / S] + static_cast<int>(token % S);
    pair[i] = turned < 0 ? pack_bf16(even, odd) : turned_pair(even, odd, turn_of(freqs[turned], position));
  }
  *reinterpret_cast<uint2*>(o + (token * H + head) * HEAD + channel) = make_uint2(pair[0], pair[1]);
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
