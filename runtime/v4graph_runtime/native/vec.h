// Vectors of one instruction set: W floats, loads that widen stored weights, and roundings of the formats.
// Included once per instruction set, inside its namespace.

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));

inline V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V splat(float x) { return x - V{}; }
inline VI splat_int(int32_t x) { return x - VI{}; }
inline V select(VI mask, V yes, V no) { return mask ? yes : no; }
inline V maximum(V a, V b) { return a > b ? a : b; }
inline V minimum(V a, V b) { return a < b ? a : b; }
inline V bits(VI x) {
    V v;
    std::memcpy(&v, &x, sizeof v);
    return v;
}
inline VI bits(V x) {
    VI v;
    std::memcpy(&v, &x, sizeof v);
    return v;
}
inline V absolute(V x) { return bits(bits(x) & 0x7fffffff); }

// Sums of the lanes, always in the same order, however many vectors are summed at once.
#if defined(__AVX512F__)
inline __m128 sum4(V a, V b, V c, V d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline float sum(V v) { return _mm_cvtss_f32(sum4(v, V{}, V{}, V{})); }
#else
inline float sum(V v) {
    float lane[W];
    std::memcpy(lane, &v, sizeof v);
    for (int step = W / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
    return lane[0];
}
#endif
template <int N>
inline void sums(const V* v, float* out) {
    int n = 0;
#if defined(__AVX512F__)
#pragma GCC unroll 8
    for (; n + 4 <= N; n += 4) _mm_storeu_ps(out + n, sum4(v[n], v[n + 1], v[n + 2], v[n + 3]));
#endif
#pragma GCC unroll 8
    for (; n < N; ++n) out[n] = sum(v[n]);
}
inline float largest(V v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float lane[W];
    std::memcpy(lane, &v, sizeof v);
    float best = lane[0];
    for (int i = 1; i < W; ++i) best = lane[i] > best ? lane[i] : best;
    return best;
#endif
}

// e^x within 2 ulp; 0 below -104, where the result is under the smallest denormal.
inline V exponential(V x) {
    V low = splat(-87.3f);
    V y = maximum(minimum(x, splat(88.7f)), low);
    V shifter = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    V n = (y * 1.44269504088896341f + shifter) - shifter;
    V r = y - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    V p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    VI exponent = (__builtin_convertvector(n, VI) + 127) << 23;
    // 2^128 has no exponent field: half of it, twice.
    VI half = (__builtin_convertvector(n, VI) + 126) << 23;
    V result = select(n > 127.0f, p * bits(half) * 2.0f, p * bits(exponent));
    return select(x < low, V{}, result);
}
inline V logistic(V x) { return 1.0f / (1.0f + exponential(-x)); }

inline float power_of_two(int exponent) {  // -126..127
    int32_t code = (exponent + 127) << 23;
    float value;
    std::memcpy(&value, &code, 4);
    return value;
}

// Exponent of the smallest power of two that is not below a positive normal value.
inline int exponent_at_least(float value) {
    int32_t code;
    std::memcpy(&code, &value, 4);
    return (code >> 23) - 127 + ((code & 0x7fffff) != 0);
}

inline float e8m0(uint8_t byte) {
    if (byte == 255) return NAN;
    return byte ? power_of_two(byte - 127) : 5.877471754111438e-39f;
}

// Stored weights, W at a time.
struct F32Weights {
    static constexpr bool quantised = false;
    static V read(const uint8_t* row, int64_t k) { return load(reinterpret_cast<const float*>(row) + k); }
    static constexpr int64_t bytes(int64_t k) { return 4 * k; }
};

struct BF16Weights {
    static constexpr bool quantised = false;
    static V read(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + 2 * k;
#if defined(__AVX512F__)
        __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return (V)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
        __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return (V)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
        VI wide;
        for (int i = 0; i < W; ++i) {
            uint16_t code;
            std::memcpy(&code, p + 2 * i, 2);
            wide[i] = static_cast<int32_t>(static_cast<uint32_t>(code) << 16);
        }
        return bits(wide);
#endif
    }
    static constexpr int64_t bytes(int64_t k) { return 2 * k; }
};

struct Fp8Table {
    float value[256];
    Fp8Table() {
        for (int code = 0; code < 256; ++code) {
            int e = code >> 3 & 15, m = code & 7;
            float v = e ? std::ldexp(8.0f + m, e - 10) : std::ldexp(static_cast<float>(m), -9);
            if ((code & 127) == 127) v = NAN;
            value[code] = code & 128 ? -v : v;
        }
    }
};
inline const Fp8Table kFp8;

struct Fp8Weights {
    static constexpr bool quantised = true;
    static V read(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k;
#if defined(__AVX512F__)
        // As half floats, whose exponent bias is 8 greater; their subnormals are e4m3's. The sign, extended, is in
        // both upper bits after the shift.
        __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        __m256i half = _mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
        return (V)_mm512_cvtph_ps(half) * 256.0f;
#elif defined(__AVX2__) && defined(__F16C__)
        __m128i w = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        __m128i half = _mm_and_si128(_mm_slli_epi16(w, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
        return (V)_mm256_cvtph_ps(half) * 256.0f;
#else
        V v;
        for (int i = 0; i < W; ++i) v[i] = kFp8.value[p[i]];
        return v;
#endif
    }
    static constexpr int64_t bytes(int64_t k) { return k; }
};

constexpr float kFp4[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

struct Fp4Weights {
    static constexpr bool quantised = true;
    static V read(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 2;
#if defined(__AVX512F__)
        __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        __m128i mask = _mm_set1_epi8(15);
        __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(b, mask), _mm_and_si128(_mm_srli_epi16(b, 4), mask));
        return (V)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), _mm512_loadu_ps(kFp4));
#elif defined(__AVX2__)
        int32_t four;
        std::memcpy(&four, p, 4);
        __m128i b = _mm_cvtsi32_si128(four), mask = _mm_set1_epi8(15);
        __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(b, mask), _mm_and_si128(_mm_srli_epi16(b, 4), mask));
        __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
        return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(table, codes))) * 0.5f;
#else
        V v;
        for (int i = 0; i < W; i += 2) {
            v[i] = kFp4[p[i / 2] & 15];
            v[i + 1] = kFp4[p[i / 2] >> 4];
        }
        return v;
#endif
    }
    static constexpr int64_t bytes(int64_t k) { return k / 2; }
};

// Rounds `count` values (a multiple of W) to e4m3 with one power-of-two scale, and back.
inline void round_fp8(const float* x, float* y, int count) {
    V peak{};
    for (int i = 0; i < count; i += W) peak = maximum(peak, absolute(load(x + i)));
    float amax = largest(peak);
    amax = amax > 1e-4f ? amax : 1e-4f;
    int e = exponent_at_least(amax * (1.0f / 448.0f));
    // Powers of two, exact; 2^-e exists for every e of a finite amax.
    float down = power_of_two(-e), up = power_of_two(e);
    for (int i = 0; i < count; i += W) {
        V v = minimum(maximum(load(x + i) * down, splat(-448.0f)), splat(448.0f));
        VI code = bits(v);
        // Three bits of mantissa, ties to even; below 2^-6 steps of 2^-9.
        VI rounded = (code + 0x7ffff + ((code >> 20) & 1)) & ~0xfffff;
        V magic = splat(24576.0f);  // 1.5 * 2^14, whose ulp is 2^-9
        V small = (v + magic) - magic;
        store(y + i, select(absolute(v) < 0.015625f, small, bits(rounded)) * up);
    }
}

// Rounds blocks of 32 values to e2m1 with one power-of-two scale each, and back.
inline void round_fp4(const float* x, float* y, int count) {
    for (int block = 0; block < count; block += 32) {
        V peak{};
        for (int i = 0; i < 32; i += W) peak = maximum(peak, absolute(load(x + block + i)));
        float amax = largest(peak), least = 6.0f * 1.17549435e-38f;
        int e = exponent_at_least((amax > least ? amax : least) * (1.0f / 6.0f));
        float down = power_of_two(e > 126 ? -126 : -e), up = power_of_two(e);
        for (int i = 0; i < 32; i += W) {
            V v = minimum(maximum(load(x + block + i) * down, splat(-6.0f)), splat(6.0f));
            V size = absolute(v);
            V step = select(size < 2.0f, splat(0.5f), select(size < 4.0f, splat(1.0f), splat(2.0f)));
            V inverse = select(size < 2.0f, splat(2.0f), select(size < 4.0f, splat(1.0f), splat(0.5f)));
            V magic = splat(12582912.0f);
            store(y + block + i, ((v * inverse + magic) - magic) * step * up);
        }
    }
}
