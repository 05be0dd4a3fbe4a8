// The indexer. Definition: v4graph/ops/index_topk.py.

// The best k of scores that arrive with rising index; ties go to the lowest.
class Best {
  public:
    explicit Best(int64_t k) : k_(k) { kept_.reserve(2 * k + kKeys); }
    // Scores [kKeys] of the entries from `first` on, of which `count` are there.
    void add_tile(float* scores, int64_t count, int32_t first) {
        std::fill(scores + count, scores + kKeys, -std::numeric_limits<float>::infinity());
        V most = load(scores);
        for (int64_t j = W; j < kKeys; j += W) most = maximum(most, load(scores + j));
        if (!(largest(most) > threshold_)) return;
        for (int64_t j = 0; j < count; ++j)
            if (scores[j] > threshold_) add(scores[j], first + static_cast<int32_t>(j));
    }
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
        KeyTile tile(Arena::mine(), C);
        float* scores = Arena::mine().get<float>(kKeys);
        std::vector<IndexQuery> queries;
        for (int64_t i = r; i < r + count; ++i) queries.emplace_back(Arena::mine(), turned + i * Q, gains + i * H, H, C);
        const float* from = keys.f32() + r / S * N * C;
        for (int64_t k = begin; k < end; k += kKeys) {
            tile.hold(from + k * C, std::min(kKeys, end - k), k + 2 * kKeys <= end ? from + (k + kKeys) * C : nullptr);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t visible = std::min(seen(r + i), std::min(end, k + kKeys)) - k;
                if (visible <= 0) continue;
                tile.score(queries[i], scores);
                best[i].add_tile(scores, visible, static_cast<int32_t>(k));
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
