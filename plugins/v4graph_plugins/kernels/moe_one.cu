// The experts of an only token: two launches, each of which looks up and rounds for itself. Source: spec section 3.
//
// Inner products lie in the order of the token's choices. What a block reads of the token is on its way before the
// weights are asked for: an SM's loads come back in order.
#include "moe_experts.cuh"

constexpr int UP_WARPS = 4;    // share the channels of 16 rows of w1 and of w3
constexpr int DOWN_WARPS = 8;  // share the experts of 16 rows of w2

// The token's choices, lane i's is number i (K <= 32); weights where the gains are asked for.
struct Choices {
  int mine, E;
  float weight;

  DEVICE Choices(const int* ids, const float* weights, int K, int E) : E(E) {
    const int lane = threadIdx.x % 32;
    mine = lane < K ? ids[lane] : -1;
    weight = weights && lane < K ? weights[lane] : 0.f;
  }

  // Expert of choice k, or -1 where it does not count: one that is not there, or that an earlier choice names.
  DEVICE int expert(int k) const {
    const int expert = __shfl_sync(FULL, mine, k);
    const bool first = __ffs(__ballot_sync(FULL, mine == expert)) - 1 == k;
    return first && expert >= 0 && expert < E ? expert : -1;
  }

  // Weight of an expert, over all choices that name it.
  DEVICE float gain(int expert) const { return warp_sum(mine == expert ? weight : 0.f); }
};

// Begin to copy `count` values (a multiple of 8) to shared memory.
DEVICE void fetch_values(bf16* shared, const bf16* from, int count) {
  for (int i = threadIdx.x * 8; i < count; i += blockDim.x * 8) cp_async16(shared + i, from + i);
  cp_async_commit();
}

// Wait for them; quantised forms round them where they lie.
template <Format F>
DEVICE void prepare_values(bf16* shared, int count) {
  cp_async_wait<0>();
  if (F != Format::BF16) {
    const auto at = [&](long i) { return shared + i * 128; };
    round_blocks(count / 128, at, at);  // each thread those that it copied
  }
  __syncthreads();
}

struct Up {
  const bf16* x;  // token [D]
  Matrices w1, w3, s1, s3;
  bf16* inner;
  int D, I, Is;
  float limit;
};

template <Format F, class Ready>
DEVICE void up_sums(float (&sums)[2][1][4], const Matrices& w1, const Matrices& w3, int expert, int width, int D,
                    Ready ready) {
  const bf16* rows[1] = {reinterpret_cast<const bf16*>(shared_memory())};
  RowsLane<F> from[2];
  from[0].point(expert_weights(w1, expert, width, D), blockIdx.x * 16);
  from[1].point(expert_weights(w3, expert, width, D), blockIdx.x * 16);
  constexpr int AHEAD = F == Format::FP4 ? 3 : F == Format::FP8 ? 2 : 1;
  multiply_few<F, AHEAD, 2, 1>(sums, from, rows, threadIdx.x / 32, UP_WARPS, D / 128, ready);
}

// Gate and value from the sums of the block's warps, and the activation. `parts`: UP_WARPS * 2 * 16 floats.
template <Format F>
DEVICE void store_up(const Up& p, const Tile& tile, const float (&sums)[2][1][4], float gain, float* parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = threadIdx.x;
  if (lane % 4 == 0) {  // has the token's column of the mma's eight
    for (int m = 0; m < 2; ++m) {
      parts[(warp * 2 + m) * 16 + lane / 4] = sums[m][0][0];
      parts[(warp * 2 + m) * 16 + lane / 4 + 8] = sums[m][0][2];
    }
  }
  __syncthreads();
  if (row >= 16) return;
  float gate = 0.f, value = 0.f;
  for (int w = 0; w < UP_WARPS; ++w) {
    gate += parts[2 * w * 16 + row];
    value += parts[(2 * w + 1) * 16 + row];
  }
  store_inner<F>(inner_row<F>(p.inner, tile, tile.first, 1, p.I, p.Is), blockIdx.x * 16 + row,
                 tile.always ? p.Is : p.I, gate, value, gain, p.limit);
}

// grid: 16 channels of the inner product in x; the shared expert, then the choices in y. Shared memory: D bf16, then
// UP_WARPS * 2 * 16 floats.
template <Format F>
DEVICE void up(const Up& p, const Choices& choices) {
  const int k = int(blockIdx.y) - 1, width = k < 0 ? p.Is : p.I;
  if (int(blockIdx.x) * 16 >= width) return;
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  fetch_values(shared, p.x, p.D);
  const auto ready = [&] { prepare_values<F>(shared, p.D); };
  float sums[2][1][4] = {}, gain = 1.f;
  if (k < 0) {
    up_sums<ALWAYS<F>>(sums, p.s1, p.s3, 0, width, p.D, ready);
  } else {
    const int expert = choices.expert(k);
    if (expert < 0) {
      cp_async_wait<0>();
      return;
    }
    gain = choices.gain(expert);
    up_sums<F>(sums, p.w1, p.w3, expert, width, p.D, ready);
  }
  store_up<F>(p, {k < 0, 0, max(k, 0), 1}, sums, gain, reinterpret_cast<float*>(shared + p.D));
}

struct Down {
  const bf16* inner;
  Matrices w2, s2;
  bf16* y;
  int K, D, I, Is;
};

// Products of an expert's inner row with 16 rows of w2 over the blocks first, first + step, ...
template <Format F, class Ready>
DEVICE void down_sums(float (&sums)[1][1][4], const Matrices& w2, int expert, int D, int width, int row0,
                      const bf16* row, int first, int step, Ready ready) {
  RowsLane<F> from[1];
  from[0].point(expert_weights(w2, expert, D, width), row0);
  constexpr int AHEAD = F == Format::BF16 ? 1 : F == Format::FP8 ? 3 : 4;
  const bf16* rows[1] = {row};
  multiply_few<F, AHEAD, 1, 1>(sums, from, rows, first, step, width / 128, ready);
  if constexpr (F == Format::BF16) {
    rows[0] += width;  // the second halves of the values
    multiply_few<F, AHEAD, 1, 1>(sums, from, rows, first, step, width / 128, [] {});
  }
}

// Down projections of all the token's experts and their sum. A block takes 32 channels of y, so that few blocks round
// the same rows; a team of warps 16 of them: two share the shared expert (its matrices are larger), the others take an
// expert at a time. Shared memory: 2 * (K + 2) * 16 floats, then Is + K * I values.
template <Format F>
DEVICE void down(const Down& p, const Choices& choices) {
  const int lane = threadIdx.x % 32, team = threadIdx.x / 32 / DOWN_WARPS, warp = threadIdx.x / 32 % DOWN_WARPS;
  const int row0 = (blockIdx.x * 2 + team) * 16, values = (p.Is + p.K * p.I) * PARTS<F>, channel = threadIdx.x % 256;
  float* parts = reinterpret_cast<float*>(shared_memory());
  bf16* shared = reinterpret_cast<bf16*>(parts + 2 * (p.K + 2) * 16);
  parts += team * (p.K + 2) * 16;
  fetch_values(shared, p.inner, values);
  const auto ready = [&] { prepare_values<F>(shared, values); };
  const auto keep = [&](const float(&sums)[1][1][4], int part) {
    if (lane % 4) return;
    parts[part * 16 + lane / 4] = sums[0][0][0];
    parts[part * 16 + lane / 4 + 8] = sums[0][0][2];
  };
  if (warp < 2) {
    float sums[1][1][4] = {};
    down_sums<ALWAYS<F>>(sums, p.s2, 0, p.D, p.Is, row0, shared, warp, 2, ready);
    keep(sums, warp);
  }
  for (int k = warp - 2; k >= 0 && (k < p.K || k < 6); k += 6) {
    const int expert = k < p.K ? choices.expert(k) : -1;
    float sums[1][1][4] = {};
    const auto once = [&] {
      if (k < 6) ready();  // which takes all warps
    };
    if (expert >= 0) {
      down_sums<F>(sums, p.w2, expert, p.D, p.I, row0, shared + (p.Is + k * p.I) * PARTS<F>, 0, 1, once);
    } else {
      once();
    }
    if (k < p.K) keep(sums, 2 + k);
  }
  __syncthreads();
  if (channel >= 16) return;
  float sum = round_as<F>(parts[channel] + parts[16 + channel]);
  for (int k = 0; k < p.K; ++k) sum += round_as<F>(parts[(2 + k) * 16 + channel]);
  p.y[row0 + channel] = to_bf16(sum);
}

#define V4_MOE_ONE(form, format)                                                                                   \
  V4_KERNEL(v4_moe_##form##_up_1, 128, 4, const int* ids, const float* weights, const bf16* x, const void* w1,     \
            const void* w1_scale, const void* w3, const void* w3_scale, int w_bytes, const void* s1,               \
            const void* s1_scale, const void* s3, const void* s3_scale, int s_bytes, bf16* inner, int K, int E,    \
            int D, int I, int Is, float limit) {                                                                   \
    up<Format::format>({x, {w1, w1_scale, w_bytes}, {w3, w3_scale, w_bytes}, {s1, s1_scale, s_bytes},              \
                        {s3, s3_scale, s_bytes}, inner, D, I, Is, limit},                                          \
                       {ids, weights, K, E});                                                                      \
  }                                                                                                                \
  V4_KERNEL(v4_moe_##form##_down_1, 512, 1, const int* ids, const bf16* inner, const void* w2,                     \
            const void* w2_scale, int w_bytes, const void* s2, const void* s2_scale, int s_bytes, bf16* y, int K,  \
            int E, int D, int I, int Is) {                                                                         \
    down<Format::format>({inner, {w2, w2_scale, w_bytes}, {s2, s2_scale, s_bytes}, y, K, D, I, Is},                \
                         {ids, nullptr, K, E});                                                                    \
  }

V4_MOE_ONE(fp4, FP4)
V4_MOE_ONE(fp8, FP8)
V4_MOE_ONE(float, BF16)
