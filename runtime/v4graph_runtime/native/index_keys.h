// Index keys, 64 at a time, and their scores: the sum over heads of gain[h] relu(q[h] . key).
//
// In v4 numerics queries and keys are FP4 with a scale per 32 channels: integers of seven bits times one power of
// two, unless their blocks' scales lie far apart. Products of such integers are exact, in int8 as in float32, but
// int8 multiplies four at a time. Which one is used depends on the query and on the key only.

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define V4_INT8 1
#endif

#if defined(__AVX512F__)
// 16 x 16 words: to[c * kKeys + i] = from[i * pitch + c].
inline void transpose_16(const float* from, int64_t pitch, float* to) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * pitch);
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
        auto put = [&](int channel, __m512 v) { _mm512_storeu_ps(to + channel * kKeys, v); };
        put(j, _mm512_shuffle_f32x4(low, low2, 0x88));
        put(8 + j, _mm512_shuffle_f32x4(low, low2, 0xdd));
        put(4 + j, _mm512_shuffle_f32x4(high, high2, 0x88));
        put(12 + j, _mm512_shuffle_f32x4(high, high2, 0xdd));
    }
}
#endif

// Keys [count, C] to [C, kKeys], missing ones zero.
inline void transpose_keys(const float* keys, int64_t count, int64_t C, float* out) {
    if (count < kKeys) std::fill_n(out, C * kKeys, 0.0f);
    int64_t done = 0;
#if defined(__AVX512F__)
    if (C % 16 == 0)
        for (; done + 16 <= count; done += 16)
            for (int64_t c = 0; c < C; c += 16) transpose_16(keys + done * C + c, C, out + c * kKeys + done);
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

#if defined(V4_INT8)
constexpr int64_t kByteWidth = 128;  // channels of the keys that become bytes; 127 * 127 * 128 < 2^24

// Lane i: the largest of v[i].
inline __m512i largest_16(const __m512i* v) {
    __m512i a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i)
        b[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        c[i] = _mm512_max_epi32(_mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0x44),
                                _mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0xee));
    return _mm512_max_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xdd));
}

// Up to 16 rows as bytes 128 + x / quantum. Returns a bit per row: whether these are integers of seven bits.
inline uint32_t pack_16(const float* x, int64_t count, uint8_t* bytes, float* quantum) {
    const __m512i size = _mm512_set1_epi32(0x7fffffff), least = _mm512_set1_epi32(-40), most = _mm512_set1_epi32(40);
    __m512i peaks[16];
    for (int64_t i = 0; i < 16; ++i) {
        const float* row = x + std::min(i, count - 1) * kByteWidth;
        peaks[i] = _mm512_and_si512(_mm512_loadu_si512(row), size);
        for (int k = 16; k < kByteWidth; k += 16)
            peaks[i] = _mm512_max_epi32(peaks[i], _mm512_and_si512(_mm512_loadu_si512(row + k), size));
    }
    const __m512i exponent = _mm512_sub_epi32(_mm512_srli_epi32(largest_16(peaks), 23), _mm512_set1_epi32(127));
    // Far from the ends of float32, so that no product with a quantum is rounded.
    const __m512i used = _mm512_max_epi32(_mm512_min_epi32(exponent, most), least);
    alignas(64) int32_t inverses[16];
    _mm512_store_si512(inverses, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127 + 6), used), 23));
    _mm512_storeu_si512(quantum, _mm512_slli_epi32(_mm512_add_epi32(_mm512_set1_epi32(127 - 6), used), 23));
    uint32_t fit = _mm512_cmple_epi32_mask(exponent, most);
    // Adding `magic` leaves 128 + x / quantum in the lowest byte.
    const __m512 magic = _mm512_set1_ps(12583040.0f);
    const __m512i step = _mm512_set_epi32(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    // Every fourth byte of two vectors, and once more.
    const __m512i lowest = _mm512_shuffle_i32x4(
        _mm512_castsi128_si512(_mm512_cvtepi32_epi8(step)),
        _mm512_castsi128_si512(_mm512_cvtepi32_epi8(_mm512_add_epi32(step, _mm512_set1_epi32(64)))), 0x00);
    const __m512i twice = _mm512_shuffle_i32x4(lowest, lowest, 0x88);
    for (int64_t i = 0; i < count; ++i) {
        const float* row = x + i * kByteWidth;
        const __m512 inverse = _mm512_castsi512_ps(_mm512_set1_epi32(inverses[i]));
        __m512i rest = _mm512_setzero_si512();
        for (int k = 0; k < kByteWidth; k += 64) {
            __m512i sum[4];
            for (int j = 0; j < 4; ++j) {
                const __m512 v = _mm512_loadu_ps(row + k + 16 * j), s = _mm512_fmadd_ps(v, inverse, magic);
                const __m512 lost = _mm512_fnmadd_ps(v, inverse, _mm512_sub_ps(s, magic));
                rest = _mm512_or_si512(rest, _mm512_castps_si512(lost));
                sum[j] = _mm512_castps_si512(s);
            }
            const __m512i low = _mm512_permutex2var_epi8(sum[0], twice, sum[1]);
            const __m512i high = _mm512_permutex2var_epi8(sum[2], twice, sum[3]);
            _mm512_storeu_si512(bytes + i * kByteWidth + k, _mm512_mask_blend_epi64(0xf0, low, high));
        }
        fit &= ~(static_cast<uint32_t>(_mm512_test_epi32_mask(rest, rest) != 0) << i);
    }
    return fit;
}

// sum += a . b, four unsigned bytes by four signed ones per lane. The intrinsic costs g++ 12 two moves each.
inline void add_dots(__m512i& sum, __m512i a, __m512i b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// score += gain[h] relu(q[h] . key) for M heads and 64 keys; `offset` takes back what the keys' 128 adds.
template <int M>
inline void add_byte_scores(const uint8_t* q, const int32_t* offset, const float* gain, const uint8_t* keys,
                            V* score) {
    __m512i dots[M][4];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) dots[m][n] = _mm512_set1_epi32(offset[m]);
    for (int64_t c = 0; c < kByteWidth; c += 4) {
        __m512i k[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) k[n] = _mm512_loadu_si512(keys + c * kKeys + 64 * n);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            int32_t four;
            std::memcpy(&four, q + m * kByteWidth + c, 4);
            const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) add_dots(dots[m][n], k[n], a);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n)
            score[n] += gain[m] * (V)_mm512_cvtepi32_ps(_mm512_max_epi32(dots[m][n], _mm512_setzero_si512()));
}
#endif

// One token's queries [heads, C] and gains; as signed bytes, too, if that is exact.
struct IndexQuery {
    const float *q, *gain;
    int64_t heads, C;
    uint8_t* bytes = nullptr;
    int32_t* offset = nullptr;
    float* byte_gain = nullptr;

    IndexQuery(Arena& arena, const float* q, const float* gain, int64_t heads, int64_t C)
        : q(q), gain(gain), heads(heads), C(C) {
#if defined(V4_INT8)
        if (C != kByteWidth) return;
        uint8_t* packed = arena.get<uint8_t>(heads * C);
        offset = arena.get<int32_t>(heads);
        byte_gain = arena.get<float>(heads + 16);
        for (int64_t h = 0; h < heads; h += 16) {
            const int64_t count = std::min<int64_t>(16, heads - h);
            const uint32_t all = (1u << count) - 1;
            if ((pack_16(q + h * C, count, packed + h * C, byte_gain + h) & all) != all) return;
        }
        for (int64_t h = 0; h < heads; ++h) {
            int32_t total = 0;
            for (int64_t c = h * C; c < (h + 1) * C; ++c) {
                packed[c] ^= 128;
                total += static_cast<int8_t>(packed[c]);
            }
            offset[h] = -128 * total;
            byte_gain[h] *= gain[h];
        }
        bytes = packed;
#else
        (void)arena;
#endif
    }
};

// Up to 64 keys in the orders in which they are multiplied.
class KeyTile {
  public:
    KeyTile(Arena& arena, int64_t C) : C_(C), floats_(arena.get<float>(C * kKeys)) {
#if defined(V4_INT8)
        rows_ = arena.get<uint8_t>(C * 16);
        bytes_ = arena.get<uint8_t>(C * kKeys);
#endif
    }

    // `next`: keys to come, as many as here, or none.
    void hold(const float* keys, int64_t count, const float* next) {
        keys_ = keys, count_ = count, turned_ = packed_ = false;
        next_ = next, next_end_ = next ? next + count * C_ : next;
    }

    // Scores [kKeys] of the query; those of missing keys are undefined.
    void score(const IndexQuery& query, float* scores) {
#if defined(V4_INT8)
        if (query.bytes) {
            if (!packed_) pack();
            if (fit_ == 0) return score_floats(query, scores);
            score_bytes(query, scores);
            const uint64_t others = ~fit_ & (count_ < kKeys ? (uint64_t{1} << count_) - 1 : ~uint64_t{0});
            if (!others) return;
            alignas(64) float exact[kKeys];
            score_floats(query, exact);
            for (int64_t i = 0; i < kKeys; ++i)
                if (others >> i & 1) scores[i] = exact[i];
            return;
        }
#endif
        score_floats(query, scores);
    }

  private:
    // Fetches some of the next keys: memory works while this tile is multiplied.
    void fetch(int64_t count) {
        const float* end = next_ + std::min(count, next_end_ - next_);
        for (; next_ < end; next_ += 16) __builtin_prefetch(next_, 0, 3);
    }

    void score_floats(const IndexQuery& query, float* scores) {
        if (!turned_) transpose_keys(keys_, count_, C_, floats_);
        turned_ = true;
        index_tile(query.q, query.gain, query.heads, floats_, C_, scores);
    }

#if defined(V4_INT8)
    void pack() {
        fit_ = 0;
        for (int64_t i = 0; i < count_; i += 16) {
            const int64_t count = std::min<int64_t>(16, count_ - i);
            fit_ |= static_cast<uint64_t>(pack_16(keys_ + i * C_, count, rows_, quantum_ + i)) << i;
            // Four channels of a key are one word.
            const float* words = reinterpret_cast<const float*>(rows_);
            for (int64_t c = 0; c < C_ / 4; c += 16)
                transpose_16(words + c, C_ / 4, reinterpret_cast<float*>(bytes_) + c * kKeys + i);
        }
        packed_ = true;
    }

    void score_bytes(const IndexQuery& query, float* scores) {
        V score[4] = {};
        int64_t h = 0;
        const int64_t share = round_up(kKeys * C_ * 4 / query.heads, 16);
        for (; h + 4 <= query.heads; h += 4) {
            fetch(share);
            add_byte_scores<4>(query.bytes + h * C_, query.offset + h, query.byte_gain + h, bytes_, score);
        }
        for (; h < query.heads; ++h)
            add_byte_scores<1>(query.bytes + h * C_, query.offset + h, query.byte_gain + h, bytes_, score);
        for (int n = 0; n < 4; ++n) store(scores + n * W, score[n] * load(quantum_ + n * W));
    }

    uint8_t *rows_ = nullptr, *bytes_ = nullptr;
    alignas(64) float quantum_[kKeys] = {};
    uint64_t fit_ = 0;
#endif
    int64_t C_, count_ = 0;
    float* floats_;
    const float *keys_ = nullptr, *next_ = nullptr, *next_end_ = nullptr;
    bool turned_ = false, packed_ = false;
};
