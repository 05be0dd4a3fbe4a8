// Norms, linear ops and routing. Definitions: v4graph/ops/linear.py, fp8_linear.py, fused.py, route.py and others.

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
