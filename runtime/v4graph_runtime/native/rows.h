// What the ops share: rows over threads, norms, rotations, roundings of a row.

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
