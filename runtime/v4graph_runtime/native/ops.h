// The ops but for attention and the indexer. Definitions: v4graph/ops, one file per op.

// Rows of an op that are worth a task of their own.
inline void each_row(Pool& pool, int64_t rows, int64_t work, const std::function<void(int64_t)>& body) {
    const int64_t group = std::max<int64_t>(1, 32768 / std::max<int64_t>(work, 1));
    pool.run((rows + group - 1) / group, [&](int64_t task) {
        for (int64_t r = task * group; r < std::min(rows, (task + 1) * group); ++r) body(r);
    });
}

// 1 / rms of n values.
inline float inverse_rms(const float* x, int64_t n, float eps) {
    V total{};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        V v = load(x + i);
        total += v * v;
    }
    float squares = sum(total);
    for (; i < n; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
}

inline void norm_row(const float* x, const float* weight, float* y, int64_t n, float eps) {
    const float r = inverse_rms(x, n, eps);
    if (weight)
        for (int64_t i = 0; i < n; ++i) y[i] = x[i] * r * weight[i];
    else
        for (int64_t i = 0; i < n; ++i) y[i] = x[i] * r;
}

// Cosine and sine of a position's angles.
struct Turn {
    float cosine[256], sine[256];
    int64_t count;
    Turn(int64_t position, const Tensor& freqs, bool inverse = false) : count(freqs[0]) {
        if (count > 256) throw std::invalid_argument("more than 256 rotary frequencies");
        for (int64_t i = 0; i < count; ++i) {
            float angle = static_cast<float>(position) * freqs.f32()[i];
            cosine[i] = std::cos(angle);
            sine[i] = inverse ? -std::sin(angle) : std::sin(angle);
        }
    }
    // Rotates the last 2 * count of n channels, pair by pair.
    void apply(float* x, int64_t n) const {
        float* tail = x + n - 2 * count;
        for (int64_t i = 0; i < count; ++i) {
            float even = tail[2 * i], odd = tail[2 * i + 1];
            tail[2 * i] = even * cosine[i] - odd * sine[i];
            tail[2 * i + 1] = even * sine[i] + odd * cosine[i];
        }
    }
};

// Rounds the channels that are not rotated to FP8 in blocks of 64.
inline void round_entry(float* x, int64_t n, int64_t rotated) {
    for (int64_t i = 0; i + 64 <= n - rotated; i += 64) round_fp8(x + i, x + i, 64);
}

inline void hadamard_128(float* x) {
    for (int half = 64; half; half /= 2)
        for (int base = 0; base < 128; base += 2 * half)
            for (int i = base; i < base + half; ++i) {
                float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    for (int i = 0; i < 128; ++i) x[i] *= 0.08838834764831845f;
}

// ---- Hyper-connections ----

constexpr int kStreams = 4;
typedef double V8 __attribute__((vector_size(64)));

// (fn v) / rms(v) in double, for M rows of fn and v of n floats.
template <int M>
inline void hyper_mixes(const float* x, const float* fn, int64_t n, float eps, float* out) {
    double sums[M + 1];
    constexpr int kGroup = 8;
    auto widen = [](const float* p) {
        typedef float F8 __attribute__((vector_size(32)));
        F8 f;
        std::memcpy(&f, p, sizeof f);
        return __builtin_convertvector(f, V8);
    };
    auto lanes = [](V8 v) {
        double total = 0;
        for (int i = 0; i < 8; ++i) total += v[i];
        return total;
    };
    for (int g = 0; g < M; g += kGroup) {
        constexpr int size = M < kGroup ? M : kGroup;
        V8 total[size] = {}, square{};
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            V8 v = widen(x + i);
            if (g == 0) square += v * v;
#pragma GCC unroll 8
            for (int r = 0; r < size; ++r) total[r] += v * widen(fn + (g + r) * n + i);
        }
        for (int r = 0; r < size; ++r) sums[g + r] = lanes(total[r]);
        if (g == 0) sums[M] = lanes(square);
        for (; i < n; ++i) {
            if (g == 0) sums[M] += static_cast<double>(x[i]) * x[i];
            for (int r = 0; r < size; ++r) sums[g + r] += static_cast<double>(x[i]) * fn[(g + r) * n + i];
        }
    }
    const double scale = 1.0 / std::sqrt(sums[M] / static_cast<double>(n) + static_cast<double>(eps));
    for (int r = 0; r < M; ++r) out[r] = static_cast<float>(sums[r] * scale);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline void sinkhorn(float* c, int64_t iters, float eps) {
    for (int i = 0; i < 16; i += 4) {
        float peak = std::max(std::max(c[i], c[i + 1]), std::max(c[i + 2], c[i + 3])), total = 0;
        for (int j = 0; j < 4; ++j) total += c[i + j] = std::exp(c[i + j] - peak);
        for (int j = 0; j < 4; ++j) c[i + j] = c[i + j] / total + eps;
    }
    auto columns = [&] {
        float inverse[4];
        for (int j = 0; j < 4; ++j) inverse[j] = (c[j] + c[4 + j]) + (c[8 + j] + c[12 + j]) + eps;
        for (int i = 0; i < 16; ++i) c[i] /= inverse[i & 3];
    };
    auto rows = [&] {
        float inverse[4];
        for (int i = 0; i < 4; ++i) inverse[i] = (c[4 * i] + c[4 * i + 1]) + (c[4 * i + 2] + c[4 * i + 3]) + eps;
        for (int i = 0; i < 16; ++i) c[i] /= inverse[i >> 2];
    };
    columns();
    for (int64_t i = 1; i < iters; ++i) {
        rows();
        columns();
    }
}

// One token: streams x [4, D] to the normed sublayer input, post and comb.
inline void hyper_pre_row(const float* x, const Tensor& fn, const Tensor& base, const Tensor& scale, const Tensor& norm,
                          const Attributes& a, float* y, float* post, float* comb) {
    const int64_t width = norm[0];
    float mix[24];
    hyper_mixes<24>(x, fn.f32(), 4 * width, a.eps, mix);
    const float *b = base.f32(), *s = scale.f32();
    float pre[4];
    for (int i = 0; i < 4; ++i) pre[i] = sigmoid(mix[i] * s[0] + b[i]) + a.hc_eps;
    for (int i = 0; i < 4; ++i) post[i] = 2 * sigmoid(mix[4 + i] * s[1] + b[4 + i]);
    for (int i = 0; i < 16; ++i) comb[i] = mix[8 + i] * s[2] + b[8 + i];
    sinkhorn(comb, a.iters, a.hc_eps);
    for (int64_t i = 0; i < width; ++i)
        y[i] = ((pre[0] * x[i] + pre[1] * x[width + i]) + pre[2] * x[2 * width + i]) + pre[3] * x[3 * width + i];
    norm_row(y, norm.f32(), y, width, a.eps);
}

inline void hyper_post_row(const float* y, const float* x, const float* post, const float* comb, int64_t width, float* z) {
    for (int k = 0; k < 4; ++k) {
        const float c0 = comb[k], c1 = comb[4 + k], c2 = comb[8 + k], c3 = comb[12 + k], p = post[k];
        float* to = z + k * width;
        for (int64_t i = 0; i < width; ++i)
            to[i] = p * y[i] + (((c0 * x[i] + c1 * x[width + i]) + c2 * x[2 * width + i]) + c3 * x[3 * width + i]);
    }
}

void V4HyperPre(Call& call) {
    const Tensor& x = call.in(0);
    const int64_t B = x[0], S = x[1], D = x[3];
    Tensor y = call.out(0, {B, S, D}), post = call.out(1, {B, S, 4}), comb = call.out(2, {B, S, 4, 4});
    const Tensor &fn = call.in(1), &base = call.in(2), &scale = call.in(3), &norm = call.in(4);
    each_row(call.pool, B * S, D * 100, [&](int64_t r) {
        hyper_pre_row(x.f32() + r * 4 * D, fn, base, scale, norm, call.attributes, y.f32() + r * D, post.f32() + r * 4,
                      comb.f32() + r * 16);
    });
}

void V4HyperPost(Call& call) {
    const Tensor &y = call.in(0), &x = call.in(1), &post = call.in(2), &comb = call.in(3);
    const int64_t D = x[3];
    Tensor z = call.out(0, {x[0], x[1], 4, D});
    each_row(call.pool, x[0] * x[1], D * 8, [&](int64_t r) {
        hyper_post_row(y.f32() + r * D, x.f32() + r * 4 * D, post.f32() + r * 4, comb.f32() + r * 16, D,
                       z.f32() + r * 4 * D);
    });
}

void V4HyperPostPre(Call& call) {
    const Tensor &y = call.in(0), &x = call.in(1), &post = call.in(2), &comb = call.in(3);
    const Tensor &fn = call.in(4), &base = call.in(5), &scale = call.in(6), &norm = call.in(7);
    const int64_t B = x[0], S = x[1], D = x[3];
    Tensor h = call.out(0, {B, S, D}), z = call.out(1, {B, S, 4, D});
    Tensor next_post = call.out(2, {B, S, 4}), next_comb = call.out(3, {B, S, 4, 4});
    each_row(call.pool, B * S, D * 100, [&](int64_t r) {
        float* streams = z.f32() + r * 4 * D;
        hyper_post_row(y.f32() + r * D, x.f32() + r * 4 * D, post.f32() + r * 4, comb.f32() + r * 16, D, streams);
        hyper_pre_row(streams, fn, base, scale, norm, call.attributes, h.f32() + r * D, next_post.f32() + r * 4,
                      next_comb.f32() + r * 16);
    });
}

void V4HyperHead(Call& call) {
    const Tensor &x = call.in(0), &fn = call.in(1), &base = call.in(2), &scale = call.in(3), &norm = call.in(4);
    const int64_t D = x[3];
    const Attributes& a = call.attributes;
    Tensor y = call.out(0, {x[0], x[1], D});
    each_row(call.pool, x[0] * x[1], D * 30, [&](int64_t r) {
        const float* from = x.f32() + r * 4 * D;
        float* to = y.f32() + r * D;
        float mix[4];
        hyper_mixes<4>(from, fn.f32(), 4 * D, a.eps, mix);
        for (int i = 0; i < 4; ++i) mix[i] = sigmoid(mix[i] * scale.f32()[0] + base.f32()[i]) + a.hc_eps;
        for (int64_t i = 0; i < D; ++i)
            to[i] = ((mix[0] * from[i] + mix[1] * from[D + i]) + mix[2] * from[2 * D + i]) + mix[3] * from[3 * D + i];
        norm_row(to, norm.f32(), to, D, a.eps);
    });
}

// ---- Projections ----

void V4RmsNorm(Call& call) {
    const Tensor &x = call.in(0), &weight = call.in(1);
    const int64_t D = x[2];
    Tensor y = call.out(0, {x[0], x[1], D});
    each_row(call.pool, x[0] * x[1], D * 2, [&](int64_t r) {
        norm_row(x.f32() + r * D, weight.f32(), y.f32() + r * D, D, call.attributes.eps);
    });
}

void V4LinearF32(Call& call) {
    const Tensor &x = call.in(0), &weight = call.in(1);
    Arena::Scope scope(Arena::mine());
    Tensor y = call.out(0, {x[0], x[1], weight[0]});
    Tokens tokens = plain_tokens(Arena::mine(), x.f32(), x.rows(), x[2]);
    multiply_all(call.pool, {{&tokens, matrix_of(weight), y.f32(), weight[0]}});
}

void V4Linear(Call& call) { V4LinearF32(call); }

void V4Fp8Linear(Call& call) {
    const Tensor &x = call.in(0), &weight = call.in(1);
    Arena::Scope scope(Arena::mine());
    Tensor y = call.out(0, {x[0], x[1], weight[0]});
    Tokens tokens = rounded_tokens(Arena::mine(), call.pool, x.f32(), x.rows(), x[2], true, false);
    multiply_all(call.pool, {{&tokens, matrix_of(weight, &call.in(2)), y.f32(), weight[0]}});
}

inline void grouped_output(Call& call, const Matrix& weight) {
    const Tensor& o = call.in(0);
    const int64_t groups = call.attributes.groups, count = o[0] * o[1];
    const int64_t width = weight.columns, rank = weight.rows / groups, all = groups * width;
    Tensor z = call.out(0, {o[0], o[1], weight.rows});
    const int64_t tokens_per_task = count == 1 ? 1 : 192;
    const int64_t tiles = (rank + kTile - 1) / kTile, parts = (count + tokens_per_task - 1) / tokens_per_task;
    call.pool.run(groups * tiles * parts, [&](int64_t task) {
        const int64_t tile = task % tiles, group = task / tiles % groups, part = task / tiles / groups;
        const int64_t row = group * rank + tile * kTile, rows = std::min(kTile, rank - tile * kTile);
        const int64_t first = part * tokens_per_task, some = std::min(tokens_per_task, count - first);
        Arena::Scope scope(Arena::mine());
        Tokens tokens{o.f32() + first * all + group * width, some, width, all};
        if (width % W) {  // the rows that follow are other groups', not padding
            float* copy = Arena::mine().get<float>(some * round_up(width, W));
            for (int64_t m = 0; m < some; ++m) {
                std::fill_n(std::copy_n(tokens.x + m * all, width, copy + m * round_up(width, W)),
                            round_up(width, W) - width, 0.0f);
            }
            tokens.x = copy, tokens.padded = round_up(width, W);
        }
        multiply(tokens, weight, row, rows, 0, some, z.f32() + first * weight.rows + row, weight.rows);
    });
}

void V4GroupedOutput(Call& call) { grouped_output(call, matrix_of(call.in(1))); }
void V4Fp8GroupedOutput(Call& call) { grouped_output(call, matrix_of(call.in(1), &call.in(2))); }

// The projections of a sublayer's input: `plain` of them, from input 5 on, unquantised.
inline void projections(Call& call, int plain) {
    const Tensor& x = call.in(0);
    Arena::Scope scope(Arena::mine());
    Tokens rounded = rounded_tokens(Arena::mine(), call.pool, x.f32(), x.rows(), x[2], true, false);
    Tokens as_is = plain_tokens(Arena::mine(), x.f32(), x.rows(), x[2]);
    Product all[7];
    for (int i = 0; i < 2 + plain; ++i) {
        const Tensor& weight = call.in(i < 2 ? 1 + 2 * i : 3 + i);
        Tensor y = call.out(i, {x[0], x[1], weight[0]});
        Matrix matrix = i < 2 ? matrix_of(weight, &call.in(2 + 2 * i)) : matrix_of(weight);
        all[i] = {i < 2 ? &rounded : &as_is, matrix, y.f32(), weight[0]};
    }
    if (plain == 0) multiply_all(call.pool, {all[0], all[1]});
    if (plain == 2) multiply_all(call.pool, {all[0], all[1], all[2], all[3]});
    if (plain == 5) multiply_all(call.pool, {all[0], all[1], all[2], all[3], all[4], all[5], all[6]});
}

void V4WindowProjections(Call& call) { projections(call, 0); }
void V4HcaProjections(Call& call) { projections(call, 2); }
void V4CsaProjections(Call& call) { projections(call, 5); }

inline void query_projections(Call& call, int count) {
    const Tensor &x = call.in(0), &norm = call.in(1);
    const int64_t rows = x.rows(), K = x[2];
    Arena::Scope scope(Arena::mine());
    float* normed = Arena::mine().get<float>(rows * K);
    each_row(call.pool, rows, 2 * K, [&](int64_t r) {
        norm_row(x.f32() + r * K, norm.f32(), normed + r * K, K, call.attributes.eps);
    });
    Tokens tokens = rounded_tokens(Arena::mine(), call.pool, normed, rows, K, true, false);
    Product all[2];
    for (int i = 0; i < count; ++i) {
        const Tensor& weight = call.in(2 + 2 * i);
        Tensor y = call.out(i, {x[0], x[1], weight[0]});
        all[i] = {&tokens, matrix_of(weight, &call.in(3 + 2 * i)), y.f32(), weight[0]};
    }
    if (count == 1) multiply_all(call.pool, {all[0]});
    if (count == 2) multiply_all(call.pool, {all[0], all[1]});
}

void V4QueryProjection(Call& call) { query_projections(call, 1); }
void V4CsaQueryProjections(Call& call) { query_projections(call, 2); }

// ---- Routing ----

inline float root_softplus(float x) {
    return std::sqrt(x > 20.0f ? x : std::log1p(std::exp(x)));
}

inline float* route_scores(Call& call, const Tensor& u, const Tensor& gate) {
    const int64_t rows = u.rows(), E = gate[0];
    float* scores = Arena::mine().get<float>(rows * E);
    Tokens tokens = plain_tokens(Arena::mine(), u.f32(), rows, u[2]);
    multiply_all(call.pool, {{&tokens, matrix_of(gate), scores, E}});
    each_row(call.pool, rows, E * 20, [=](int64_t r) {
        for (int64_t e = 0; e < E; ++e) scores[r * E + e] = root_softplus(scores[r * E + e]);
    });
    return scores;
}

inline void route_weights(const float* scores, const int32_t* ids, int64_t K, float scale, float* weights) {
    float total = 0;
    for (int64_t k = 0; k < K; ++k) total += scores[ids[k]];
    for (int64_t k = 0; k < K; ++k) weights[k] = scores[ids[k]] / total * scale;
}

void V4RouteTopK(Call& call) {
    const Tensor &u = call.in(0), &gate = call.in(1), &bias = call.in(2);
    const int64_t E = gate[0], K = call.attributes.topk;
    if (K > E) throw std::invalid_argument("topk is more than the number of experts");
    Tensor ids = call.out(0, {u[0], u[1], K}), weights = call.out(1, {u[0], u[1], K});
    Arena::Scope scope(Arena::mine());
    const float* scores = route_scores(call, u, gate);
    each_row(call.pool, u.rows(), E * K, [&](int64_t r) {
        std::vector<float> key(E);
        for (int64_t e = 0; e < E; ++e) key[e] = scores[r * E + e] + bias.f32()[e];
        int32_t* chosen = ids.i32() + r * K;
        for (int64_t k = 0; k < K; ++k) {
            int64_t best = -1;
            for (int64_t e = 0; e < E; ++e) {
                bool taken = std::find(chosen, chosen + k, static_cast<int32_t>(e)) != chosen + k;
                if (!taken && (best < 0 || key[e] > key[best])) best = e;
            }
            chosen[k] = static_cast<int32_t>(best);
        }
        route_weights(scores + r * E, chosen, K, call.attributes.scale, weights.f32() + r * K);
    });
}

void V4RouteHash(Call& call) {
    const Tensor &u = call.in(0), &gate = call.in(1), &table = call.in(2), &tokens = call.in(3);
    const int64_t E = gate[0], K = table[1];
    Tensor ids = call.out(0, {u[0], u[1], K}), weights = call.out(1, {u[0], u[1], K});
    Arena::Scope scope(Arena::mine());
    const float* scores = route_scores(call, u, gate);
    for (int64_t r = 0; r < u.rows(); ++r) {
        const int64_t token = tokens.i64()[r];
        if (token < 0 || token >= table[0]) throw std::invalid_argument("a token id lies outside the routing table");
        for (int64_t k = 0; k < K; ++k) {
            const int64_t id = table.i64()[token * K + k];
            if (id < 0 || id >= E) throw std::invalid_argument("the routing table names an expert that is not there");
            ids.i32()[r * K + k] = static_cast<int32_t>(id);
        }
        route_weights(scores + r * E, ids.i32() + r * K, K, call.attributes.scale, weights.f32() + r * K);
    }
}

// ---- Experts ----

struct Expert {
    Matrix w1, w3, w2;
};

// Experts at work in one call: which rows of the tokens each has, and with which weights.
struct Work {
    Expert expert;
    std::vector<int64_t> rows;
    std::vector<float> gains;
    Tokens tokens;    // the rows, gathered
    Tokens inner;     // silu(gate) * value * gain
    float *gate, *value, *result;
};

inline void swiglu(const float* gate, const float* value, float gain, float limit, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        V g = minimum(load(gate + i), splat(limit));
        V v = maximum(minimum(load(value + i), splat(limit)), splat(-limit));
        store(out + i, g * logistic(g) * v * gain);
    }
    for (; i < n; ++i) {
        float g = std::min(gate[i], limit), v = std::max(std::min(value[i], limit), -limit);
        out[i] = g * sigmoid(g) * v * gain;
    }
}

// Adds every expert's output to y [rows, D], in the order of `all`; y starts at zero.
inline void run_experts(Pool& pool, const float* x, int64_t count, std::vector<Work>& all, float limit, float* y) {
    Arena& arena = Arena::mine();
    const int64_t D = all[0].expert.w2.rows;
    bool quantised = false, fp8 = false, fp4 = false;
    for (const Work& work : all) {
        quantised |= work.expert.w1.format == Format::FP8 || work.expert.w1.format == Format::FP4;
        fp8 |= work.expert.w1.format == Format::FP8;
        fp4 |= work.expert.w1.format == Format::FP4;
    }
    // Rounded once per token; experts gather rounded rows.
    Tokens source = quantised ? rounded_tokens(arena, pool, x, count, D, fp8, fp4) : plain_tokens(arena, x, count, D);
    int64_t most = 0;
    for (Work& work : all) {
        const int64_t n = static_cast<int64_t>(work.rows.size()), I = work.expert.w1.rows;
        work.gate = arena.get<float>(n * I);
        work.value = arena.get<float>(n * I);
        most = std::max(most, n);
        if (count == 1 || n == count) {
            work.tokens = source;
            continue;
        }
        Tokens& tokens = work.tokens = Tokens{nullptr, n, D, source.padded};
        float* gathered = arena.get<float>(n * source.padded);
        uint16_t *to8 = source.fp8_order && work.expert.w1.format == Format::FP8 ? arena.get<uint16_t>(n * D) : nullptr;
        uint16_t *to4 = source.fp4_order && work.expert.w1.format == Format::FP4 ? arena.get<uint16_t>(n * D) : nullptr;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t r = work.rows[i];
            // With bfloat16 the float rows are read only where a scale does not fit it.
            std::memcpy(gathered + i * source.padded, source.x + r * source.padded, source.padded * sizeof(float));
            if (to8) std::memcpy(to8 + i * D, source.fp8_order + r * D, D * sizeof(uint16_t));
            if (to4) std::memcpy(to4 + i * D, source.fp4_order + r * D, D * sizeof(uint16_t));
        }
        tokens.x = gathered, tokens.fp8_order = to8, tokens.fp4_order = to4;
    }
    struct Task {
        Work* work;
        int64_t row, rows, first, count;
    };
    std::vector<Task> tasks;
    const int64_t chunk = 384;
    for (Work& work : all) {
        const Matrix& w = work.expert.w1;
        int64_t rows = kTile;
        while (most == 1 && rows * w.row_bytes() < 32768 && rows * pool.threads() < w.rows) rows *= 2;
        for (int64_t m = 0; m < work.tokens.count; m += chunk)
            for (int64_t r = 0; r < w.rows; r += rows)
                tasks.push_back({&work, r, std::min(rows, w.rows - r), m, std::min(chunk, work.tokens.count - m)});
    }
    pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
        const Task& t = tasks[i];
        const int64_t I = t.work->expert.w1.rows;
        multiply(t.work->tokens, t.work->expert.w1, t.row, t.rows, t.first, t.count, t.work->gate + t.row, I);
        multiply(t.work->tokens, t.work->expert.w3, t.row, t.rows, t.first, t.count, t.work->value + t.row, I);
        for (int64_t m = t.first; m < t.first + t.count; ++m) {
            float* gate = t.work->gate + m * I + t.row;
            swiglu(gate, t.work->value + m * I + t.row, t.work->gains[m], limit, gate, t.rows);
        }
    });
    // One rounding pass over all inner rows: they lie in `gate`, expert by expert.
    for (Work& work : all) {
        const int64_t n = work.tokens.count, I = work.expert.w1.rows;
        const bool rounds = work.expert.w2.format == Format::FP8 || work.expert.w2.format == Format::FP4;
        work.inner = rounds ? rounded_tokens(arena, pool, work.gate, n, I, work.expert.w2.format == Format::FP8,
                                             work.expert.w2.format == Format::FP4)
                            : plain_tokens(arena, work.gate, n, I);
    }
    // Each task has a range of output channels for itself and adds the experts in order.
    const int64_t columns = kTile;
    pool.run((D + columns - 1) / columns, [&](int64_t task) {
        Arena::Scope scope(Arena::mine());
        const int64_t row = task * columns, rows = std::min(columns, D - row);
        float* result = Arena::mine().get<float>(std::min(most, chunk) * rows);
        for (Work& work : all)
            for (int64_t m = 0; m < work.tokens.count; m += chunk) {
                const int64_t some = std::min(chunk, work.tokens.count - m);
                Tokens tokens = work.inner;
                tokens.x += m * tokens.padded;
                if (tokens.fp8_order) tokens.fp8_order += m * tokens.columns;
                if (tokens.fp4_order) tokens.fp4_order += m * tokens.columns;
                multiply(tokens, work.expert.w2, row, rows, 0, some, result, rows);
                for (int64_t i = 0; i < some; ++i) {
                    float* to = y + work.rows[m + i] * D + row;
                    for (int64_t c = 0; c < rows; ++c) to[c] += result[i * rows + c];
                }
            }
    });
}

inline void all_rows(Work& work, int64_t count) {
    work.rows.resize(count);
    for (int64_t r = 0; r < count; ++r) work.rows[r] = r;
    work.gains.assign(count, 1.0f);
}

// `routed` and `shared` make the matrices; `routed` of all experts, [E, ...].
inline void mixture(Call& call, const Expert& routed, const Expert& shared, int64_t experts) {
    const Tensor &u = call.in(0), &ids = call.in(1), &weights = call.in(2);
    const int64_t count = u.rows(), D = u[2], K = ids[2];
    Tensor y = call.out(0, {u[0], u[1], D});
    std::memset(y.f32(), 0, y.size() * sizeof(float));
    if (count == 0) return;
    std::vector<std::vector<std::pair<int64_t, float>>> hits(experts);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t k = 0; k < K; ++k) {
            const int32_t e = ids.i32()[r * K + k];
            if (e < 0 || e >= experts) throw std::invalid_argument("an expert id is outside the experts");
            // An expert that is named twice works once, with both weights.
            if (!hits[e].empty() && hits[e].back().first == r) hits[e].back().second += weights.f32()[r * K + k];
            else hits[e].push_back({r, weights.f32()[r * K + k]});
        }
    Arena::Scope scope(Arena::mine());
    std::vector<Work> all(1);
    all[0].expert = shared;
    all_rows(all[0], count);
    for (int64_t e = 0; e < experts; ++e) {
        if (hits[e].empty()) continue;
        Work work{};
        work.expert = {routed.w1.part(e), routed.w3.part(e), routed.w2.part(e)};
        for (auto& [row, gain] : hits[e]) work.rows.push_back(row), work.gains.push_back(gain);
        all.push_back(std::move(work));
    }
    run_experts(call.pool, u.f32(), count, all, call.attributes.limit, y.f32());
}

inline Expert quantised_expert(Call& call, int first, bool fp4) {
    auto one = [&](int i) { return matrix_of(call.in(first + i), &call.in(first + i + 1), fp4); };
    return {one(0), one(2), one(4)};
}

inline Expert float_expert(Call& call, int first) {
    return {matrix_of(call.in(first)), matrix_of(call.in(first + 1)), matrix_of(call.in(first + 2))};
}

void V4MoE(Call& call) {
    mixture(call, quantised_expert(call, 3, true), quantised_expert(call, 9, false), call.in(3)[0]);
}
void V4MoEFp8(Call& call) {
    mixture(call, quantised_expert(call, 3, false), quantised_expert(call, 9, false), call.in(3)[0]);
}
void V4MoEFloat(Call& call) { mixture(call, float_expert(call, 3), float_expert(call, 6), call.in(3)[0]); }

inline void single(Call& call, const Expert& expert) {
    const Tensor &x = call.in(0), &weight = call.in(1);
    Tensor y = call.out(0, {x[0], x[1]});
    std::memset(y.f32(), 0, y.size() * sizeof(float));
    if (x[0] == 0) return;
    Arena::Scope scope(Arena::mine());
    std::vector<Work> all(1);
    all[0].expert = expert;
    all_rows(all[0], x[0]);
    all[0].gains.assign(weight.f32(), weight.f32() + x[0]);
    run_experts(call.pool, x.f32(), x[0], all, call.attributes.limit, y.f32());
}

void V4ExpertFp4(Call& call) { single(call, quantised_expert(call, 2, true)); }
void V4ExpertFp8(Call& call) { single(call, quantised_expert(call, 2, false)); }
void V4ExpertFloat(Call& call) { single(call, float_expert(call, 2)); }

// ---- Attention's inputs ----

// Inputs and outputs of attention_prep from `in` and `out` on: q, kv, kv_norm, freqs, start.
inline void attention_prep(Call& call, bool quantise) {
    const Tensor &q = call.in(0), &kv = call.in(1), &norm = call.in(2), &freqs = call.in(3), &start = call.in(4);
    const int64_t B = kv[0], S = kv[1], D = kv[2], H = q[2] / D;
    const float eps = call.attributes.eps;
    Tensor q_out = call.out(0, {B, S, H, D}), kv_out = call.out(1, {B, S, D});
    const int64_t split = B * S < call.pool.threads() ? 4 : 1;  // head groups
    each_row(call.pool, B * S * split, H * D * 4 / split, [&](int64_t task) {
        const int64_t r = task / split, part = task % split;
        Turn turn(start.i32()[r / S] + r % S, freqs);
        for (int64_t h = H * part / split; h < H * (part + 1) / split; ++h) {
            float* to = q_out.f32() + (r * H + h) * D;
            norm_row(q.f32() + (r * H + h) * D, nullptr, to, D, eps);
            turn.apply(to, D);
        }
        if (part) return;
        float* entry = kv_out.f32() + r * D;
        norm_row(kv.f32() + r * D, norm.f32(), entry, D, eps);
        turn.apply(entry, D);
        if (quantise) round_entry(entry, D, 2 * freqs[0]);
    });
}

void V4AttentionPrep(Call& call) { attention_prep(call, call.attributes.quantise != 0); }

// Writes the chunk's valid rows over ring rows; `extra` is added per position modulo its number of rows.
inline void update_ring(const Tensor& ring, const float* rows, int64_t S, const Tensor& start, const Tensor& num,
                        float* out) {
    const int64_t B = ring[0], L = ring[1], D = ring[2];
    if (out != ring.f32()) std::memcpy(out, ring.f32(), ring.size() * sizeof(float));
    for (int64_t b = 0; b < B; ++b)
        for (int64_t s = std::max<int64_t>(0, num.i32()[b] - L); s < num.i32()[b]; ++s)
            std::memcpy(out + (b * L + (start.i32()[b] + s) % L) * D, rows + (b * S + s) * D, D * sizeof(float));
}

struct Compressor {
    int kv, gate, ape, norm, tail_kv, tail_gate, cache;  // inputs
    int freqs, start, num;
    int out;                                             // its first output
    bool overlap;
    enum { kNone, kKv, kIndex } rounding;
};

inline void compress(Call& call, const Compressor& c) {
    const Tensor &kv = call.in(c.kv), &gate = call.in(c.gate), &ape = call.in(c.ape), &norm = call.in(c.norm);
    const Tensor &tail_kv = call.in(c.tail_kv), &tail_gate = call.in(c.tail_gate), &cache = call.in(c.cache);
    const Tensor &freqs = call.in(c.freqs), &start = call.in(c.start), &num = call.in(c.num);
    const int64_t B = kv[0], S = kv[1], CC = kv[2], R = ape[0], L = tail_kv[1], N = cache[1], C = cache[2];
    Tensor cache_out = call.out(c.out, {B, N, C});
    Tensor kv_out = call.out(c.out + 1, {B, L, CC}), gate_out = call.out(c.out + 2, {B, L, CC});
    if (cache_out.data != cache.data) std::memcpy(cache_out.data, cache.data, cache.size() * sizeof(float));
    Arena::Scope scope(Arena::mine());
    float* placed = Arena::mine().get<float>(B * S * CC);  // the gate with ape added
    each_row(call.pool, B * S, CC, [&](int64_t r) {
        const float* add = ape.f32() + (start.i32()[r / S] + r % S) % R * CC;
        for (int64_t i = 0; i < CC; ++i) placed[r * CC + i] = gate.f32()[r * CC + i] + add[i];
    });
    const int64_t most = (S + R - 1) / R + 1;
    each_row(call.pool, B * most, C * R * (c.overlap ? 2 : 1) * 4, [&](int64_t task) {
        const int64_t b = task / most, first = start.i32()[b], end = first + num.i32()[b];
        const int64_t block = first / R + task % most;
        if ((block + 1) * R > end || block >= N) return;
        // Rows of the block (and, with overlap, of the one before) that exist; first half of the channels before.
        std::vector<const float*> values, scores;
        for (int64_t back = c.overlap ? 1 : 0; back >= 0; --back)
            for (int64_t i = 0; i < R; ++i) {
                const int64_t u = (block - back) * R + i, low = c.overlap && back == 0 ? C : 0;
                if (u < 0) continue;
                const int64_t at = u >= first ? (b * S + u - first) * CC + low : (b * L + u % L) * CC + low;
                values.push_back((u >= first ? kv.f32() : tail_kv.f32()) + at);
                scores.push_back((u >= first ? placed : tail_gate.f32()) + at);
            }
        float* entry = cache_out.f32() + (b * N + block) * C;
        for (int64_t i = 0; i < C; i += W) {
            V peak = load(scores[0] + i);
            for (const float* s : scores) peak = maximum(peak, load(s + i));
            V total{}, weighted{};
            for (size_t j = 0; j < scores.size(); ++j) {
                V p = exponential(load(scores[j] + i) - peak);
                total += p;
                weighted += p * load(values[j] + i);
            }
            store(entry + i, weighted / total);
        }
        norm_row(entry, norm.f32(), entry, C, call.attributes.eps);
        Turn(block * R, freqs).apply(entry, C);
        if (c.rounding == Compressor::kKv) round_entry(entry, C, 2 * freqs[0]);
        if (c.rounding == Compressor::kIndex) {
            hadamard_128(entry + C - 128);
            round_fp4(entry, entry, static_cast<int>(C));
        }
    });
    update_ring(tail_kv, kv.f32(), S, start, num, kv_out.f32());
    update_ring(tail_gate, placed, S, start, num, gate_out.f32());
}

void V4Compress(Call& call) {
    const std::string& how = call.attributes.rounding;
    auto rounding = how == "kv" ? Compressor::kKv : how == "index" ? Compressor::kIndex : Compressor::kNone;
    compress(call, {0, 1, 2, 3, 7, 8, 9, 4, 5, 6, 0, call.attributes.overlap != 0, rounding});
}

void V4HcaPrep(Call& call) {
    attention_prep(call, true);
    compress(call, {6, 7, 8, 9, 10, 11, 12, 3, 4, 5, 2, false, Compressor::kKv});
}

void V4CsaPrep(Call& call) {
    attention_prep(call, true);
    compress(call, {6, 7, 8, 9, 10, 11, 12, 3, 4, 5, 2, true, Compressor::kKv});
    compress(call, {13, 14, 15, 16, 17, 18, 19, 3, 4, 5, 5, true, Compressor::kIndex});
}
