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

// A warp chooses for one token; lane l holds the experts l, l + 32, ... (at most 512 in all).
V4_KERNEL(v4_route_topk, 128, 4, const float* logits, const float* bias, int* ids, float* weights, int T, int E,
          int K, int splits, float scale) {
  constexpr int SLOTS = 16;
  const int lane = threadIdx.x % 32;
  const long token = long(blockIdx.x) * 4 + threadIdx.x / 32;
  if (token >= T) return;
  float score[SLOTS];
  unsigned order[SLOTS];  // 0: not there, or chosen before
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    const int expert = lane + 32 * i;
    score[i] = 0.f;
    order[i] = 0;
    if (expert >= E) continue;
    float logit = 0.f;
    for (int s = 0; s < splits; ++s) logit += logits[(s * long(T) + token) * E + expert];
    score[i] = route_score(logit);
    order[i] = ordered_bits(score[i] + bias[expert]);
  }
  int id = 0;
  float weight = 0.f;
  for (int k = 0; k < K; ++k) {
    unsigned long long best = 0;  // of equal scores, the lowest expert
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      const unsigned long long key = static_cast<unsigned long long>(order[i]) << 32 | unsigned(~(lane + 32 * i));
      if (order[i] && key > best) best = key;
    }
    for (int offset = 16; offset; offset >>= 1) {
      const unsigned long long other = __shfl_xor_sync(FULL, best, offset);
      if (other > best) best = other;
    }
    const int expert = int(~unsigned(best));
    float chosen = 0.f;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      if (expert != lane + 32 * i) continue;
      chosen = score[i];
      order[i] = 0;
    }
    chosen = __shfl_sync(FULL, chosen, expert % 32);
    if (lane == k) {
      id = expert;
      weight = chosen;
    }
  }
  const float sum = warp_sum(weight);
  if (lane >= K) return;
  ids[token * K + lane] = id;
  weights[token * K + lane] = weight / sum * scale;
}

// Products of one token with up to 8 experts (-1: none); a block's threads share the channels.
DEVICE void dot_chosen(float (&sum)[8], const bf16* u, const bf16* gate, const int (&experts)[8], int D) {
  for (int at = threadIdx.x * 8; at < D; at += blockDim.x * 8) {
    const Floats8 x = unpack8(load16(u + at));
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (experts[k] < 0) continue;
      const Floats8 w = unpack8(load16(gate + long(experts[k]) * D + at));
      for (int i = 0; i < 8; ++i) sum[k] += x.v[i] * w.v[i];
    }
  }
}

// A block takes one token and only the K <= 32 experts that its id has in `table` [V, K]. What lies outside the table
// or the experts gets weight 0. Shared memory: 8 warps * 8 floats, then 32 floats.
V4_KERNEL(v4_route_hash, 256, 4, const bf16* u, const bf16* gate, const long* table, const long* tokens, int* ids,
          float* weights, int V, int D, int E, int K, float scale) {
  float* partial = reinterpret_cast<float*>(shared_memory());
  float* scores = partial + 64;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long token = blockIdx.x, row = tokens[token];
  const bool known = row >= 0 && row < V;
  for (int first = 0; first < K; first += 8) {
    int experts[8];
    float sum[8] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const long expert = known && first + k < K ? table[row * K + first + k] : -1;
      experts[k] = expert >= 0 && expert < E ? int(expert) : -1;
    }
    dot_chosen(sum, u + token * D, gate, experts, D);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      sum[k] = warp_sum(sum[k]);
      if (lane == k) partial[warp * 8 + k] = sum[k];
    }
    __syncthreads();
    if (threadIdx.x < 8 && first + threadIdx.x < unsigned(K)) {
      const int k = threadIdx.x;
      const long expert = known ? table[row * K + first + k] : -1;
      float logit = 0.f;
      for (int w = 0; w < 8; ++w) logit += partial[w * 8 + k];
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
