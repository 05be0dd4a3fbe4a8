// Attention's inputs: queries, key/value rows, compressed entries, rings. Definitions: v4graph/ops/attention_prep.py, compress.py.

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
