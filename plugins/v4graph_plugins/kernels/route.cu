// Routing: the experts of every token and their weights. Source: spec section 3.
//
// Logits are summed in float32 and in an order that does not depend on the expert or on the token's place in the
// batch, so equal rows of the gate give equal scores and ties are real ties.
#include "device.cuh"

// sqrt(softplus(x)), with the threshold of torch's softplus.
DEVICE float route_score(float x) { return sqrtf(x > 20.f ? x : log1pf(expf(x))); }

// Bits that order like the value.
DEVICE unsigned ordered_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Products of 16 experts with 8*NT tokens over channels k, k + step, ... below `end`, 32 at a time; rows are given
// per lane (experts lane/4 and lane/4 + 8, tokens lane/4 + 8j). The channels of a step are permuted, for experts and
// tokens alike, so that a lane's share of a row is 16 consecutive bytes.
template <int NT>
DEVICE void multiply_rows(float (&sum)[NT][4], const bf16* const (&experts)[2], const bf16* const (&tokens)[NT],
                          int k, int end, int step) {
  const int part = threadIdx.x % 4 * 8;
#pragma unroll(NT > 4 ? 1 : 4)
  for (; k < end; k += step) {
    const int at = k + part;
    const bool inside = at < end;
    uint4 a[2], b[NT];
#pragma unroll
    for (int i = 0; i < 2; ++i) a[i] = inside ? load16(experts[i] + at) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < NT; ++j) b[j] = inside ? load16(tokens[j] + at) : make_uint4(0, 0, 0, 0);
    const unsigned low[4] = {a[0].x, a[1].x, a[0].y, a[1].y}, high[4] = {a[0].z, a[1].z, a[0].w, a[1].w};
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const unsigned first[2] = {b[j].x, b[j].y}, second[2] = {b[j].z, b[j].w};
      mma_bf16(sum[j], low, first);
      mma_bf16(sum[j], high, second);
    }
  }
}

// Few tokens: a block takes 16 experts, 8*NT tokens and `span` channels; its 8 warps share the channels.
// logits is [splits, T, E]; shared memory 8 * 16 * 8*NT floats.
template <int NT>
DEVICE void logits_few(const bf16* u, const bf16* gate, float* logits, int T, int D, int E, int span) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_expert = blockIdx.x * 16, first_token = blockIdx.z * 8 * NT;
  const bf16* experts[2];
  const bf16* tokens[NT];
  for (int i = 0; i < 2; ++i) experts[i] = gate + long(min(first_expert + lane / 4 + 8 * i, E - 1)) * D;
#pragma unroll
  for (int j = 0; j < NT; ++j) tokens[j] = u + long(min(first_token + lane / 4 + 8 * j, T - 1)) * D;
  float sum[NT][4] = {};
  const int begin = blockIdx.y * span, end = min(begin + span, D);
  multiply_rows<NT>(sum, experts, tokens, begin + 32 * warp, end, 256);
  float* shared = reinterpret_cast<float*>(shared_memory());  // [warp][expert][token]
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int expert = lane / 4 + i / 2 * 8, token = 8 * j + lane % 4 * 2 + i % 2;
      shared[(warp * 16 + expert) * 8 * NT + token] = sum[j][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * 8 * NT; i += blockDim.x) {
    const int expert = first_expert + i % 16, token = first_token + i / 16;
    if (expert >= E || token >= T) continue;
    float total = 0.f;
    for (int w = 0; w < 8; ++w) total += shared[(w * 16 + i % 16) * 8 * NT + i / 16];
    logits[(long(blockIdx.y) * T + token) * E + expert] = total;
  }
}

V4_KERNEL(v4_route_logits_8, 256, 2, const bf16* u, const bf16* gate, float* logits, int T, int D, int E, int span) {
  logits_few<1>(u, gate, logits, T, D, E, span);
}

V4_KERNEL(v4_route_logits_32, 256, 2, const bf16* u, const bf16* gate, float* logits, int T, int D, int E, int span) {
  logits_few<4>(u, gate, logits, T, D, E, span);
}

// Many tokens: a block takes 128 experts (16 a warp), 64 tokens and `span` channels.
V4_KERNEL(v4_route_logits_many, 256, 2, const bf16* u, const bf16* gate, float* logits, int T, int D, int E,
          int span) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_expert = blockIdx.z * 128 + warp * 16, first_token = blockIdx.x * 64;
  if (first_expert >= E) return;
  const bf16* experts[2];
  const bf16* tokens[8];
  for (int i = 0; i < 2; ++i) experts[i] = gate + long(min(first_expert + lane / 4 + 8 * i, E - 1)) * D;
#pragma unroll
  for (int j = 0; j < 8; ++j) tokens[j] = u + long(min(first_token + lane / 4 + 8 * j, T - 1)) * D;
  float total[8][4] = {};
  const int begin = blockIdx.y * span, end = min(begin + span, D);
  // Tensor cores may truncate what they add up, which shows in long sums: every 512 channels start a new one.
  for (int k = begin; k < end; k += 512) {
    float sum[8][4] = {};
    multiply_rows<8>(sum, experts, tokens, k, min(k + 512, end), 32);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < 4; ++i) total[j][i] += sum[j][i];
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int expert = first_expert + lane / 4 + i / 2 * 8, token = first_token + 8 * j + lane % 4 * 2 + i % 2;
      if (expert < E && token < T) logits[(long(blockIdx.y) * T + token) * E + expert] = total[j][i];
    }
  }
}

// The K largest of 32 * SLOTS orders, in chosen[0 .. K), equal ones by number; lane l holds l * SLOTS, ... . For one
// warp; `order` and `chosen` are shared memory, and 0 stands for no expert.
template <int SLOTS>
DEVICE void choose(const unsigned* order, int* chosen, int K) {
  const int lane = threadIdx.x % 32;
  unsigned mine[SLOTS];
#pragma unroll
  for (int i = 0; i < SLOTS; i += 4) {
    const uint4 four = load16(order + lane * SLOTS + i);
    mine[i] = four.x, mine[i + 1] = four.y, mine[i + 2] = four.z, mine[i + 3] = four.w;
  }
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    unsigned best = 0;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) best = max(best, mine[i]);
    const unsigned top = __reduce_max_sync(FULL, best);
    const int owner = __ffs(int(__ballot_sync(FULL, best == top))) - 1;
    int slot = 0;
#pragma unroll
    for (int i = SLOTS - 1; i >= 0; --i) slot = mine[i] == top ? i : slot;
    if (lane != owner) continue;
    chosen[k] = lane * SLOTS + slot;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) mine[i] = i == slot ? 0u : mine[i];
  }
  __syncwarp();
}

// The sum of an expert's splits, in their order; eight at a time are on their way.
DEVICE float sum_splits(const float* logits, long stride, int splits) {
  float logit = 0.f;
  for (int first = 0; first < splits; first += 8) {
    float part[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) part[i] = first + i < splits ? logits[(first + i) * stride] : 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) logit += part[i];
  }
  return logit;
}

// A block scores the experts of one token (at most 512), a warp of it chooses. Shared memory: 512 orders, 512 scores,
// 32 numbers.
V4_KERNEL(v4_route_topk, 256, 4, const float* logits, const float* bias, int* ids, float* weights, int T, int E,
          int K, int splits, float scale) {
  unsigned* order = reinterpret_cast<unsigned*>(shared_memory());  // 0: no expert
  float* scores = reinterpret_cast<float*>(order + 512);
  int* chosen = reinterpret_cast<int*>(scores + 512);
  const int lane = threadIdx.x % 32;
  const long token = blockIdx.x;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int expert = threadIdx.x + 256 * half;
    order[expert] = 0;
    if (expert >= E) continue;
    const float add = bias[expert];
    const float score = route_score(sum_splits(logits + token * E + expert, long(T) * E, splits));
    scores[expert] = score;
    order[expert] = ordered_bits(score + add);
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  if (E <= 256) {
    choose<8>(order, chosen, K);
  } else {
    choose<16>(order, chosen, K);
  }
  const int id = lane < K ? chosen[lane] : 0;
  const float weight = lane < K ? scores[id] : 0.f, sum = warp_sum(weight);
  if (lane >= K) return;
  ids[token * K + lane] = id;
  weights[token * K + lane] = weight / sum * scale;
}

// Products of one token with up to 4 rows (null: none); 256 threads share the channels.
DEVICE void dot_rows(float (&sum)[4], const bf16* u, const bf16* const (&rows)[4], int D) {
#pragma unroll 2
  for (int at = threadIdx.x % 256 * 8; at < D; at += 256 * 8) {
    uint4 raw[4];  // all on their way before the first is used
#pragma unroll
    for (int k = 0; k < 4; ++k) raw[k] = rows[k] ? load16(rows[k] + at) : make_uint4(0, 0, 0, 0);
    const Floats8 x = unpack8(load16(u + at));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Floats8 w = unpack8(raw[k]);
      for (int i = 0; i < 8; ++i) sum[k] += x.v[i] * w.v[i];
    }
  }
}

// A block takes one token and only the K <= 32 experts that its id has in `table` [V, K]: eight at a time, four for
// each half of the threads. What lies outside the table or the experts gets weight 0. Shared memory: 16 warps *
// 4 floats, then 32 floats.
V4_KERNEL(v4_route_hash, 512, 2, const bf16* u, const bf16* gate, const long* table, const long* tokens, int* ids,
          float* weights, int V, int D, int E, int K, float scale) {
  float* partial = reinterpret_cast<float*>(shared_memory());
  float* scores = partial + 64;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = warp / 8;
  const long token = blockIdx.x, row = tokens[token];
  const bool known = row >= 0 && row < V;
  for (int first = 0; first < K; first += 8) {
    const bf16* rows[4];
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = first + half * 4 + i;
      const long expert = known && k < K ? table[row * K + k] : -1;
      rows[i] = expert >= 0 && expert < E ? gate + expert * D : nullptr;
    }
    dot_rows(sum, u + token * D, rows, D);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] = warp_sum(sum[i]);
      if (lane == i) partial[warp * 4 + i] = sum[i];
    }
    __syncthreads();
    if (threadIdx.x < 8 && first + threadIdx.x < unsigned(K)) {
      const int k = threadIdx.x;
      const long expert = known ? table[row * K + first + k] : -1;
      float logit = 0.f;
#pragma unroll
      for (int w = 0; w < 8; ++w) logit += partial[(k / 4 * 8 + w) * 4 + k % 4];
      scores[first + k] = expert >= 0 && expert < E ? route_score(logit) : 0.f;
      ids[token * K + first + k] = int(expert);
    }
    __syncthreads();
  }
  if (int(threadIdx.x) >= K) return;
  float total = 0.f;
  for (int k = 0; k < K; ++k) total += scores[k];
  weights[token * K + threadIdx.x] = total > 0.f ? scores[threadIdx.x] / total * scale : 0.f;
}
