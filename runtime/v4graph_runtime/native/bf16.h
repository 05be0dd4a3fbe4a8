// Products in bfloat16, exact for e4m3 x e4m3 and e4m3 x e2m1, summed in float32: AVX512-BF16 with VBMI only.

#if defined(V4_BF16)
constexpr float kLargest = 1.15292150e18f;  // 2^60; with the scales below, no bfloat16 over- or underflows
constexpr uint8_t kLeastScale = 32, kMostScale = 190;

// Tokens as bfloat16 (exact) in the order in which a decoder emits 64 columns: see `fp8_pair`, `fp4_pair`.
inline void pack_bf16(const float* x, int64_t columns, uint16_t* fp8, uint16_t* fp4) {
    alignas(64) uint16_t plain[64];
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28,
                                          26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int64_t k = 0; k < columns; k += 64) {
        for (int i = 0; i < 64; i += 16) {
            __m512i word = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(x + k + i)), 16);
            _mm256_store_si256(reinterpret_cast<__m256i*>(plain + i), _mm512_cvtepi32_epi16(word));
        }
        __m512i a = _mm512_load_si512(plain), b = _mm512_load_si512(plain + 32);
        if (fp4) {
            _mm512_storeu_si512(fp4 + k, _mm512_permutex2var_epi16(a, even, b));
            _mm512_storeu_si512(fp4 + k + 32, _mm512_permutex2var_epi16(a, odd, b));
        }
        if (fp8) {
            // Lanes of 8 words: even lanes first, then odd ones.
            const __m512i low = _mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0);
            const __m512i high = _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2);
            _mm512_storeu_si512(fp8 + k, _mm512_permutex2var_epi64(a, low, b));
            _mm512_storeu_si512(fp8 + k + 32, _mm512_permutex2var_epi64(a, high, b));
        }
    }
}

struct Fp8Decoder {
    __m512i high0, high1, low0, low1, sign;
    Fp8Decoder() {
        alignas(64) uint8_t high[128], low[128];
        for (int code = 0; code < 128; ++code) {
            float value = code == 127 ? 0.0f : kFp8.value[code];
            uint32_t word;
            std::memcpy(&word, &value, 4);
            if (code == 127) word = 0x7fc00000;
            high[code] = static_cast<uint8_t>(word >> 24);
            low[code] = static_cast<uint8_t>(word >> 16);
        }
        high0 = _mm512_load_si512(high), high1 = _mm512_load_si512(high + 64);
        low0 = _mm512_load_si512(low), low1 = _mm512_load_si512(low + 64);
        sign = _mm512_set1_epi8(static_cast<char>(0x80));
    }
    // 64 codes as bfloat16: the first 8 of every 16, then the others.
    void pair(const uint8_t* p, __m512i& first, __m512i& second) const {
        __m512i w = _mm512_loadu_si512(p);
        __m512i high = _mm512_permutex2var_epi8(high0, w, high1);
        __m512i low = _mm512_permutex2var_epi8(low0, w, low1);
        high = _mm512_ternarylogic_epi32(high, w, sign, 0xf8);
        first = _mm512_unpacklo_epi8(low, high);
        second = _mm512_unpackhi_epi8(low, high);
    }
};

struct Fp4Decoder {
    __m512i table, upper, nibble, spread;
    Fp4Decoder() {
        alignas(64) uint16_t words[32];
        for (int i = 0; i < 32; ++i) {
            float value = kFp4[i & 15];
            uint32_t word;
            std::memcpy(&word, &value, 4);
            // The scale's exponent comes on top, with its bias.
            words[i] = value == 0 ? 0 : static_cast<uint16_t>((word >> 16) - (127 << 7));
        }
        table = _mm512_load_si512(words);
        nibble = _mm512_set1_epi16(15);
        alignas(64) uint16_t half[32];
        for (int i = 0; i < 32; ++i) half[i] = i < 16 ? 0 : 16;
        upper = _mm512_load_si512(half);
        alignas(64) uint8_t shuffle[64];
        for (int i = 0; i < 64; ++i) shuffle[i] = i & 1 ? 0x80 : i < 32 ? 0 : 1;
        spread = _mm512_load_si512(shuffle);
    }
    // 64 codes as bfloat16 times their two scales: even columns, then odd ones.
    void pair(const uint8_t* p, const uint8_t* scale, __m512i& first, __m512i& second) const {
        uint16_t two;
        std::memcpy(&two, scale, 2);
        __m512i exponent = _mm512_shuffle_epi8(_mm512_set1_epi16(static_cast<short>(two)), spread);
        __m512i scaled = _mm512_mask_add_epi16(table, 0xfefefefe, table, _mm512_slli_epi16(exponent, 7));
        __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        __m512i low = _mm512_ternarylogic_epi32(w, nibble, upper, 0xea);  // (w & nibble) | upper
        __m512i high = _mm512_or_si512(_mm512_srli_epi16(w, 4), upper);
        first = _mm512_permutexvar_epi16(low, scaled);
        second = _mm512_permutexvar_epi16(high, scaled);
    }
};

inline V dot_bf16(V sum, __m512i a, __m512i b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// Adds to the exponents of all values but zeros.
inline __m512i scale_bf16(__m512i v, __m512i exponent) {
    __mmask32 there = _mm512_test_epi16_mask(v, _mm512_set1_epi16(0x7fff));
    return _mm512_mask_add_epi16(v, there, v, exponent);
}

inline __m512i exponent_words(uint8_t scale) { return _mm512_set1_epi16(static_cast<short>((scale - 127) * 128)); }

inline bool scales_fit(const uint8_t* scale, int64_t count) {
    uint8_t bad = 0;  // no short cuts: the loop is a vector of comparisons
    for (int64_t i = 0; i < count; ++i)
        bad |= static_cast<uint8_t>(static_cast<uint8_t>(scale[i] - kLeastScale) > kMostScale - kLeastScale);
    return !bad;
}

// Whether the rows' scales keep bfloat16 exact.
inline bool fits_bf16(const Matrix& w, int64_t row, int64_t rows) {
    if (!w.scale) return false;
    if (w.format == Format::FP4) return scales_fit(w.scale + row * (w.columns / 32), rows * (w.columns / 32));
    return scales_fit(w.scale + (row / 128) * (w.columns / 128), w.columns / 128);
}

template <int R>
inline void stream_fp8(const Fp8Decoder& decoder, const Matrix& w, int64_t row, const uint16_t* x, float* y) {
    V sum[R];
    for (int r = 0; r < R; ++r) sum[r] = V{};
    const uint8_t* p = w.row(row);
    const int64_t step = w.columns;
    for (int64_t k = 0; k < step; k += 64) {
        const uint8_t* next = p + fetch_at(R, step, k);
        __m512i a = _mm512_loadu_si512(x + k), b = _mm512_loadu_si512(x + k + 32);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            __m512i first, second;
            _mm_prefetch(reinterpret_cast<const char*>(next + r * step), _MM_HINT_T0);
            decoder.pair(p + r * step + k, first, second);
            sum[r] = dot_bf16(dot_bf16(sum[r], first, a), second, b);
        }
    }
    sums<R>(sum, y);
}

template <int R>
inline void stream_fp4(const Fp4Decoder& decoder, const Matrix& w, int64_t row, const uint16_t* x, float* y) {
    V sum[R];
    for (int r = 0; r < R; ++r) sum[r] = V{};
    const int64_t step = w.columns / 2, scales = w.columns / 32;
    const uint8_t *p = w.row(row), *s = w.scale + row * scales;
    for (int64_t k = 0; k < w.columns; k += 64) {
        const uint8_t* next = p + fetch_at(R, step, k / 2);
        __m512i a = _mm512_loadu_si512(x + k), b = _mm512_loadu_si512(x + k + 32);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            __m512i first, second;
            _mm_prefetch(reinterpret_cast<const char*>(next + r * step), _MM_HINT_T0);
            decoder.pair(p + r * step + k / 2, s + r * scales + k / 32, first, second);
            sum[r] = dot_bf16(dot_bf16(sum[r], first, a), second, b);
        }
    }
    sums<R>(sum, y);
}

template <int M, int N>
inline void block_bf16(const uint16_t* x, int64_t columns, const uint16_t* w, float* y, int64_t stride) {
    V total[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[m][n] = V{};
    for (int64_t k = 0; k < columns; k += 32) {
        __m512i b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) b[n] = _mm512_loadu_si512(w + n * columns + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            __m512i a = _mm512_loadu_si512(x + m * columns + k);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total[m][n] = dot_bf16(total[m][n], b[n], a);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums<N>(total[m], y + m * stride);
}
#endif  // V4_BF16
