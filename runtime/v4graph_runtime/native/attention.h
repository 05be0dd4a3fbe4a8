// The hybrid attention. Definition: v4graph/ops/attention.py.
//
// Keys are taken 64 at a time with an online softmax, so memory does not grow with tokens times context. A
// query's keys are cut into the same parts whatever the chunk, and parts are joined in order: any schedule gives
// the same bits.

constexpr int64_t kKeys = 64, kPart = 256;

// Softmax over some of a query's keys, for heads [first, last): o is not divided by total yet.
struct Partial {
    float* peak;   // [H]
    float* total;  // [H]
    float* o;      // [H, D]
    static Partial make(Arena& arena, int64_t heads, int64_t width) {
        return {arena.get<float>(heads), arena.get<float>(heads), arena.get<float>(heads * width)};
    }
};

struct Query {
    const float* q;  // [H, D]
    int64_t heads, width;
    float scale;
    std::vector<const float*> keys;
};

// o[h] += p[h] x tile for M heads and N vectors of channels.
template <int M, int N>
inline void add_values(const float* p, const float* tile, int64_t pitch, int64_t count, int64_t width, float* o) {
    V total[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[m][n] = load(o + m * width + n * W);
    for (int64_t k = 0; k < count; ++k) {
        V v[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) v[n] = load(tile + k * pitch + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            V a = splat(p[m * kKeys + k]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total[m][n] += a * v[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(o + m * width + n * W, total[m][n]);
}

// Starts to fetch channels [begin, end) of the keys from `first` on: memory works while others are multiplied.
// Always inline: to g++ a call that only prefetches has no effect, and goes.
[[gnu::always_inline]] inline void fetch(const Query& query, int64_t first, int64_t count, int64_t begin, int64_t end) {
    const int64_t last = std::min<int64_t>(first + count, static_cast<int64_t>(query.keys.size()));
    for (int64_t k = first; k < last; ++k)
        for (int64_t c = round_up(begin, 16); c < end; c += 16) __builtin_prefetch(query.keys[k] + c, 0, 2);
}

inline void attend_part(const Query& query, int64_t part, int64_t first, int64_t last, const Partial& to) {
    const int64_t D = query.width, begin = part * kPart;
    const int64_t end = std::min<int64_t>(begin + kPart, static_cast<int64_t>(query.keys.size()));
    Arena::Scope scope(Arena::mine());
    // Rows a power of two apart would share few sets of the cache.
    const int64_t pitch = D + 16;
    float* tile = Arena::mine().get<float>(kKeys * pitch);
    float* scores = Arena::mine().get<float>((last - first) * kKeys);
    const float* q = query.q + first * D;
    for (int64_t h = first; h < last; ++h) {
        to.peak[h] = -std::numeric_limits<float>::infinity();
        to.total[h] = 0;
        std::fill_n(to.o + h * D, D, 0.0f);
    }
    for (int64_t k = begin; k < end; k += kKeys) {
        const int64_t count = std::min(kKeys, end - k), padded = round_up(count, W);
        for (int64_t i = 0; i < count; ++i) std::memcpy(tile + i * pitch, query.keys[k + i], D * sizeof(float));
        blocks(last - first, count, [&](auto M, auto N, int64_t m, int64_t n) {
            fetch(query, k + kKeys + n, N(), m * D / (last - first), (m + M()) * D / (last - first));
            block_f32<M(), N()>(q + m * D, D, tile + n * pitch, pitch, D, scores + m * kKeys + n, kKeys);
        });
        for (int64_t h = first; h < last; ++h) {
            float* s = scores + (h - first) * kKeys;
            for (int64_t i = 0; i < count; ++i) s[i] *= query.scale;
            for (int64_t i = count; i < padded; ++i) s[i] = -std::numeric_limits<float>::infinity();
            V best = load(s);
            for (int64_t i = W; i < padded; i += W) best = maximum(best, load(s + i));
            const float peak = std::max(to.peak[h], largest(best));
            V sums{};
            for (int64_t i = 0; i < padded; i += W) {
                V p = exponential(load(s + i) - peak);
                sums += p;
                store(s + i, p);
            }
            float shrink = 0;
            if (to.peak[h] != peak && to.total[h] != 0) {
                shrink = std::exp(to.peak[h] - peak);
                for (int64_t i = 0; i < D; i += W) store(to.o + h * D + i, load(to.o + h * D + i) * shrink);
            } else if (to.total[h] != 0) {
                shrink = 1;
            }
            to.total[h] = to.total[h] * shrink + sum(sums);
            to.peak[h] = peak;
        }
        int64_t d = 0;
        auto heads = [&](auto N) {
            auto some = [&](auto M, int64_t h) {
                add_values<M(), N()>(scores + (h - first) * kKeys, tile + d, pitch, count, D, to.o + h * D + d);
            };
            int64_t h = first;
            for (; h + kBlockM <= last; h += kBlockM) some(Int<kBlockM>(), h);
            for (; h + 2 <= last; h += 2) some(Int<2>(), h);
            for (; h < last; ++h) some(Int<1>(), h);
        };
        for (; d + 4 * W <= D; d += 4 * W) heads(Int<4>());
        for (; d < D; d += W) heads(Int<1>());
    }
}

inline void join(const Partial& to, const Partial& other, int64_t first, int64_t last, int64_t D) {
    for (int64_t h = first; h < last; ++h) {
        const float peak = std::max(to.peak[h], other.peak[h]);
        const float a = std::exp(to.peak[h] - peak), b = std::exp(other.peak[h] - peak);
        for (int64_t i = 0; i < D; i += W)
            store(to.o + h * D + i, load(to.o + h * D + i) * a + load(other.o + h * D + i) * b);
        to.total[h] = to.total[h] * a + other.total[h] * b;
        to.peak[h] = peak;
    }
}

inline void finish(const Partial& from, const float* sink, const Turn& turn, int64_t first, int64_t last, int64_t D,
                   float* o) {
    for (int64_t h = first; h < last; ++h) {
        const float inverse = 1.0f / (from.total[h] + std::exp(sink[h] - from.peak[h]));
        for (int64_t i = 0; i < D; i += W) store(o + h * D + i, load(from.o + h * D + i) * inverse);
        turn.apply(o + h * D, D);
    }
}

// `more` appends the compressed entries that a query sees: (slot, token, position, keys).
template <typename More>
inline void attention(Call& call, More&& more) {
    const Tensor &q = call.in(0), &kv = call.in(1), &sink = call.in(2), &freqs = call.in(3);
    const Tensor &start = call.in(4), &num = call.in(5), &ring = call.in(6);
    const int64_t B = q[0], S = q[1], H = q[2], D = q[3], L = ring[1];
    const Attributes& a = call.attributes;
    if (D % W) throw std::invalid_argument("head_dim must be a multiple of 16");
    Tensor o = call.out(0, {B, S, H, D}), ring_out = call.out(1, {B, L, D});
    auto query = [&](int64_t r) {
        const int64_t b = r / S, first = start.i32()[b], position = first + r % S;
        Query one{q.f32() + r * H * D, H, D, a.scale, {}};
        for (int64_t p = std::max<int64_t>(0, position - a.window + 1); p <= position; ++p)
            one.keys.push_back(p >= first ? kv.f32() + (b * S + p - first) * D : ring.f32() + (b * L + p % L) * D);
        more(b, r % S, position, one.keys);
        return one;
    };
    auto parts_of = [](const Query& one) { return (static_cast<int64_t>(one.keys.size()) + kPart - 1) / kPart; };
    auto turn_of = [&](int64_t r) { return Turn(start.i32()[r / S] + r % S, freqs, true); };
    if (B * S >= 2 * call.pool.threads()) {
        call.pool.run(B * S, [&](int64_t r) {
            Arena::Scope scope(Arena::mine());
            Query one = query(r);
            Partial whole = Partial::make(Arena::mine(), H, D), next = Partial::make(Arena::mine(), H, D);
            attend_part(one, 0, 0, H, whole);
            for (int64_t part = 1; part < parts_of(one); ++part) {
                attend_part(one, part, 0, H, next);
                join(whole, next, 0, H, D);
            }
            finish(whole, sink.f32(), turn_of(r), 0, H, D, o.f32() + r * H * D);
        });
    } else {
        Arena::Scope scope(Arena::mine());
        for (int64_t r = 0; r < B * S; ++r) {
            Query one = query(r);
            const int64_t parts = parts_of(one);
            int64_t groups = 1;
            while (parts * groups < 2 * call.pool.threads() && groups * 2 * kBlockM <= H) groups *= 2;
            const int64_t some = (H + groups - 1) / groups;
            // Parts that follow each other are one task: each fetches the next one's keys.
            const int64_t run = std::max<int64_t>(1, parts / (4 * call.pool.threads()));
            std::vector<Partial> all;
            for (int64_t part = 0; part < parts; ++part) all.push_back(Partial::make(Arena::mine(), H, D));
            call.pool.run((parts + run - 1) / run * groups, [&](int64_t task) {
                const int64_t first = task % groups * some, begin = task / groups * run;
                for (int64_t part = begin; part < std::min(parts, begin + run); ++part)
                    attend_part(one, part, first, std::min(H, first + some), all[part]);
            });
            const Turn turn = turn_of(r);
            each_row(call.pool, H, parts * D * 8, [&](int64_t h) {
                for (int64_t part = 1; part < parts; ++part) join(all[0], all[part], h, h + 1, D);
                finish(all[0], sink.f32(), turn, h, h + 1, D, o.f32() + r * H * D);
            });
        }
    }
    // Last: the new ring may be the old one's memory.
    update_ring(ring, kv.f32(), S, start, num, ring_out.f32());
}

void V4WindowAttention(Call& call) {
    attention(call, [](int64_t, int64_t, int64_t, std::vector<const float*>&) {});
}

void V4CompressedAttention(Call& call) {
    const Tensor& cache = call.in(7);
    const int64_t N = cache[1], D = cache[2], ratio = call.attributes.ratio;
    attention(call, [&](int64_t b, int64_t, int64_t position, std::vector<const float*>& keys) {
        for (int64_t i = 0; i < std::min(N, (position + 1) / ratio); ++i) keys.push_back(cache.f32() + (b * N + i) * D);
    });
}

void V4SelectedAttention(Call& call) {
    const Tensor &cache = call.in(7), &rows = call.in(8);
    const int64_t N = cache[1], D = cache[2], S = rows[1], K = rows[2];
    attention(call, [&](int64_t b, int64_t s, int64_t, std::vector<const float*>& keys) {
        const int32_t* chosen = rows.i32() + (b * S + s) * K;
        for (int64_t i = 0; i < K; ++i) {
            if (chosen[i] >= N) throw std::invalid_argument("a selected row is outside the cache");
            if (chosen[i] >= 0) keys.push_back(cache.f32() + (b * N + chosen[i]) * D);
        }
    });
}
