// The hybrid attention and the indexer. Definitions: v4graph/ops/attention.py, index_topk.py.
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
inline void add_values(const float* p, const float* tile, int64_t count, int64_t width, float* o) {
    V total[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[m][n] = load(o + m * width + n * W);
    for (int64_t k = 0; k < count; ++k) {
        V v[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) v[n] = load(tile + k * width + n * W);
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

inline void attend_part(const Query& query, int64_t part, int64_t first, int64_t last, const Partial& to) {
    const int64_t D = query.width, begin = part * kPart;
    const int64_t end = std::min<int64_t>(begin + kPart, static_cast<int64_t>(query.keys.size()));
    Arena::Scope scope(Arena::mine());
    float* tile = Arena::mine().get<float>(kKeys * D);
    float* scores = Arena::mine().get<float>((last - first) * kKeys);
    const float* q = query.q + first * D;
    for (int64_t h = first; h < last; ++h) {
        to.peak[h] = -std::numeric_limits<float>::infinity();
        to.total[h] = 0;
        std::fill_n(to.o + h * D, D, 0.0f);
    }
    for (int64_t k = begin; k < end; k += kKeys) {
        const int64_t count = std::min(kKeys, end - k), padded = round_up(count, W);
        for (int64_t i = 0; i < count; ++i) std::memcpy(tile + i * D, query.keys[k + i], D * sizeof(float));
        blocks(last - first, count, [&](auto M, auto N, int64_t m, int64_t n) {
            block_f32<M(), N()>(q + m * D, D, tile + n * D, D, D, scores + m * kKeys + n, kKeys);
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
            int64_t h = first;
            for (; h + kBlockM <= last; h += kBlockM)
                add_values<kBlockM, N()>(scores + (h - first) * kKeys, tile + d, count, D, to.o + h * D + d);
            for (; h < last; ++h) add_values<1, N()>(scores + (h - first) * kKeys, tile + d, count, D, to.o + h * D + d);
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
            std::vector<Partial> all;
            for (int64_t part = 0; part < parts; ++part) all.push_back(Partial::make(Arena::mine(), H, D));
            call.pool.run(parts * groups, [&](int64_t task) {
                const int64_t first = task % groups * some;
                attend_part(one, task / groups, first, std::min(H, first + some), all[task / groups]);
            });
            for (int64_t part = 1; part < parts; ++part) join(all[0], all[part], 0, H, D);
            finish(all[0], sink.f32(), turn_of(r), 0, H, D, o.f32() + r * H * D);
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

// ---- Indexer ----

// The best k of scores that arrive with rising index; ties go to the lowest.
class Best {
  public:
    explicit Best(int64_t k) : k_(k) { kept_.reserve(2 * k + kKeys); }
    float threshold() const { return threshold_; }
    void add(float score, int32_t index) {
        kept_.push_back({score, index});
        if (static_cast<int64_t>(kept_.size()) >= 2 * k_ + kKeys) cut();
    }
    // Best first.
    const std::vector<std::pair<float, int32_t>>& sorted() {
        if (static_cast<int64_t>(kept_.size()) > k_) cut();
        std::sort(kept_.begin(), kept_.end(), before);
        return kept_;
    }

  private:
    static bool before(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
        return a.first > b.first || (a.first == b.first && a.second < b.second);
    }
    void cut() {
        std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end(), before);
        kept_.resize(k_);
        threshold_ = kept_[k_ - 1].first;
    }
    int64_t k_;
    float threshold_ = -std::numeric_limits<float>::infinity();
    std::vector<std::pair<float, int32_t>> kept_;
};

// Keys [count, C] to [C, kKeys], missing ones zero.
inline void transpose_keys(const float* keys, int64_t count, int64_t C, float* out) {
    if (count < kKeys) std::fill_n(out, C * kKeys, 0.0f);
    int64_t done = 0;
#if defined(__AVX512F__)
    if (C % 16 == 0)
        for (; done + 16 <= count; done += 16)
            for (int64_t c = 0; c < C; c += 16) {
                __m512 a[16], b[16];
                for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(keys + (done + i) * C + c);
                for (int i = 0; i < 16; i += 2) {
                    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
                    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
                }
                for (int i = 0; i < 16; i += 4) {
                    auto pair = [&](int x, int y, bool high) {
                        __m512d p = _mm512_castps_pd(b[x]), q = _mm512_castps_pd(b[y]);
                        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
                    };
                    a[i] = pair(i, i + 2, false), a[i + 1] = pair(i, i + 2, true);
                    a[i + 2] = pair(i + 1, i + 3, false), a[i + 3] = pair(i + 1, i + 3, true);
                }
                // a[4g + j] lane l: channel 4l + j of keys 4g..4g+3.
                for (int j = 0; j < 4; ++j) {
                    __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
                    __m512 low2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
                    __m512 high2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
                    auto put = [&](int channel, __m512 v) { _mm512_storeu_ps(out + (c + channel) * kKeys + done, v); };
                    put(j, _mm512_shuffle_f32x4(low, low2, 0x88));
                    put(8 + j, _mm512_shuffle_f32x4(low, low2, 0xdd));
                    put(4 + j, _mm512_shuffle_f32x4(high, high2, 0x88));
                    put(12 + j, _mm512_shuffle_f32x4(high, high2, 0xdd));
                }
            }
#endif
    for (int64_t i = done; i < count; ++i)
        for (int64_t c = 0; c < C; ++c) out[c * kKeys + i] = keys[i * C + c];
}

// score += gain[h] relu(q[h] . key) for M heads and N vectors of keys.
template <int M, int N>
inline void add_scores(const float* q, const float* gain, const float* keys, int64_t C, V* score) {
    V dots[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) dots[m][n] = V{};
    for (int64_t c = 0; c < C; ++c) {
        V k[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) k[n] = load(keys + c * kKeys + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            V a = splat(q[m * C + c]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) dots[m][n] += a * k[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) score[n] += gain[m] * maximum(dots[m][n], V{});
}

inline void index_tile(const float* q, const float* gain, int64_t heads, const float* keys, int64_t C, float* scores) {
    constexpr int N = 4;
    for (int64_t j = 0; j < kKeys; j += N * W) {
        V score[N] = {};
        int64_t h = 0;
        for (; h + kBlockM <= heads; h += kBlockM) add_scores<kBlockM, N>(q + h * C, gain + h, keys + j, C, score);
        for (; h < heads; ++h) add_scores<1, N>(q + h * C, gain + h, keys + j, C, score);
        for (int n = 0; n < N; ++n) store(scores + j + n * W, score[n]);
    }
}

void V4IndexTopK(Call& call) {
    const Tensor &q = call.in(0), &weights = call.in(1), &keys = call.in(2), &freqs = call.in(3), &start = call.in(4);
    const int64_t B = q[0], S = q[1], Q = q[2], H = weights[2], N = keys[1], C = keys[2];
    const Attributes& a = call.attributes;
    const int64_t K = a.topk;
    Tensor rows = call.out(0, {B, S, K});
    if (K <= 0) return;
    Arena::Scope scope(Arena::mine());
    float* turned = Arena::mine().get<float>(B * S * Q);
    float* gains = Arena::mine().get<float>(B * S * H);
    each_row(call.pool, B * S, Q * 4, [&](int64_t r) {
        Turn turn(start.i32()[r / S] + r % S, freqs);
        for (int64_t h = 0; h < H; ++h) {
            float* to = turned + r * Q + h * C;
            std::memcpy(to, q.f32() + r * Q + h * C, C * sizeof(float));
            turn.apply(to, C);
            if (a.quantise) {
                hadamard_128(to + C - 128);
                round_fp4(to, to, static_cast<int>(C));
            }
            gains[r * H + h] = weights.f32()[r * H + h] * a.scale;
        }
    });
    auto seen = [&](int64_t r) { return std::min<int64_t>(N, (start.i32()[r / S] + r % S + 1) / a.ratio); };
    // Tokens [r, r + count) of one slot against keys [begin, end), those that each sees.
    auto score = [&](int64_t r, int64_t count, int64_t begin, int64_t end, Best* best) {
        Arena::Scope inner(Arena::mine());
        float *tile = Arena::mine().get<float>(C * kKeys), *scores = Arena::mine().get<float>(kKeys);
        const float* from = keys.f32() + r / S * N * C;
        for (int64_t k = begin; k < end; k += kKeys) {
            transpose_keys(from + k * C, std::min(kKeys, end - k), C, tile);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t visible = std::min(seen(r + i), std::min(end, k + kKeys)) - k;
                if (visible <= 0) continue;
                index_tile(turned + (r + i) * Q, gains + (r + i) * H, H, tile, C, scores);
                for (int64_t j = 0; j < visible; ++j)
                    if (scores[j] > best[i].threshold()) best[i].add(scores[j], static_cast<int32_t>(k + j));
            }
        }
    };
    auto put = [&](int64_t r, Best& best) {
        int32_t* to = rows.i32() + r * K;
        std::fill_n(to, K, -1);
        for (auto& one : best.sorted()) *to++ = one.second;
    };
    const int64_t threads = call.pool.threads();
    if (B * S >= 2 * threads) {
        const int64_t group = std::min<int64_t>(16, std::max<int64_t>(1, S / (2 * threads)));
        const int64_t groups = (S + group - 1) / group;
        call.pool.run(B * groups, [&](int64_t task) {
            // The last tokens see most: they go first.
            const int64_t first = (groups - 1 - task % groups) * group, count = std::min(group, S - first);
            const int64_t r = task / groups * S + first;
            std::vector<Best> best(count, Best(K));
            score(r, count, 0, seen(r + count - 1), best.data());
            for (int64_t i = 0; i < count; ++i) put(r + i, best[i]);
        });
        return;
    }
    for (int64_t r = 0; r < B * S; ++r) {
        const int64_t visible = seen(r);
        const int64_t part = std::max<int64_t>(512, round_up((visible + 4 * threads - 1) / (4 * threads), kKeys));
        const int64_t parts = std::max<int64_t>(1, (visible + part - 1) / part);
        std::vector<Best> found(parts, Best(K));
        call.pool.run(parts, [&](int64_t i) {
            score(r, 1, i * part, std::min(visible, (i + 1) * part), &found[i]);
            found[i].sorted();
        });
        Best best(K);
        for (Best& one : found)
            for (auto& [value, index] : one.sorted()) best.add(value, index);
        put(r, best);
    }
}
