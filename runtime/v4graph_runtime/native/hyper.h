// The hyper-connections. Definitions: v4graph/ops/hyper_*.py.

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
