// The mixture of experts. Definitions: v4graph/ops/moe.py, expert.py.

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
    bool fp8 = false, fp4 = false;
    for (const Work& work : all) {
        fp8 |= work.expert.w1.format == Format::FP8;
        fp4 |= work.expert.w1.format == Format::FP4;
    }
    // Rounded once per token; experts gather rounded rows.
    Tokens source = fp8 || fp4 ? rounded_tokens(arena, pool, x, count, D, fp8, fp4) : plain_tokens(arena, x, count, D);
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
        while (most == 1 && rows * w.row_bytes() < 262144 && rows * pool.threads() < w.rows) rows *= 2;
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
    int64_t span = kTile;  // longer for one token: the start of a range finds nothing fetched
    while (most == 1 && span < 4 * kTile && span * pool.threads() * 8 < D) span *= 2;
    pool.run((D + span - 1) / span, [&](int64_t task) {
        Arena::Scope scope(Arena::mine());
        const int64_t row = task * span, rows = std::min(span, D - row);
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
