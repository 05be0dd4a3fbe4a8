// y = x W^T for stored weights W [rows, columns], one row per output.
//
// Every output is summed in one order, whatever the number of tokens: lane by lane over the columns, then over
// the lanes. A prompt in one piece, in chunks and token by token gives the same bits.
//
// One token streams the weights and decodes them in registers. More tokens decode a tile of rows once and
// multiply it by every token. Where the instruction set has bfloat16 products (exact for e4m3 x e4m3 and
// e4m3 x e2m1, summed in float32), FP8-rounded tokens use them; all else is float32.

// Float32 dot products of W-wide lanes; the rows lie `pitch` floats apart and are padded to W.
template <int M, int N>
inline void block_f32(const float* x, int64_t x_pitch, const float* w, int64_t w_pitch, int64_t columns, float* y,
                      int64_t stride) {
    V total[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[m][n] = V{};
    for (int64_t k = 0; k < columns; k += W) {
        V b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) b[n] = load(w + n * w_pitch + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            V a = load(x + m * x_pitch + k);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total[m][n] += a * b[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums<N>(total[m], y + m * stride);
}

#if defined(__AVX512F__)
constexpr int kBlockM = 6, kBlockN = 4;
#else
constexpr int kBlockM = 3, kBlockN = 4;
#endif

template <int N>
using Int = std::integral_constant<int, N>;

// Calls `block(M, N, m, n)` for the blocks of `count` tokens and `rows` rows.
template <int M, typename Block>
inline void block_rows(int64_t m, int64_t rows, Block&& block) {
    int64_t n = 0;
    for (; n + kBlockN <= rows; n += kBlockN) block(Int<M>(), Int<kBlockN>(), m, n);
    for (; n < rows; ++n) block(Int<M>(), Int<1>(), m, n);
}

template <typename Block>
inline void blocks(int64_t count, int64_t rows, Block&& block) {
    int64_t m = 0;
    for (; m + kBlockM <= count; m += kBlockM) block_rows<kBlockM>(m, rows, block);
    for (; m + 2 <= count; m += 2) block_rows<2>(m, rows, block);
    for (; m < count; ++m) block_rows<1>(m, rows, block);
}

template <typename F>
inline void decode_row(const Matrix& w, int64_t r, float* out) {
    const uint8_t* row = w.row(r);
    int64_t k = 0;
    if constexpr (F::quantised) {
        for (; k < w.columns; k += 32) {
            float scale = w.scale_at(r, F::bytes(2) == 1 ? k : k & ~int64_t{127});
            for (int i = 0; i < 32; i += W) store(out + k + i, F::read(row, k + i) * scale);
        }
    } else {
        for (; k + W <= w.columns; k += W) store(out + k, F::read(row, k));
        if (k < w.columns) {
            uint8_t tail[W * 4] = {};
            std::memcpy(tail, row + F::bytes(k), F::bytes(w.columns - k));
            store(out + k, F::read(tail, 0));
        }
    }
}

inline void decode_row(const Matrix& w, int64_t r, float* out) {
    switch (w.format) {
        case Format::F32: return decode_row<F32Weights>(w, r, out);
        case Format::BF16: return decode_row<BF16Weights>(w, r, out);
        case Format::FP8: return decode_row<Fp8Weights>(w, r, out);
        case Format::FP4: return decode_row<Fp4Weights>(w, r, out);
    }
}

// R rows times one token, decoded on the way.
template <typename F, int R>
inline void stream_f32(const Matrix& w, int64_t row, const float* x, float* y) {
    V total[R];
    for (int r = 0; r < R; ++r) total[r] = V{};
    const uint8_t* p = w.row(row);
    const int64_t step = w.row_bytes();
    if constexpr (F::quantised) {
        for (int64_t k = 0; k < w.columns; k += 32) {
            float scale[R];
            const bool line = F::bytes(k) % 64 == 0;
            const uint8_t* next = p + fetch_at(R, step, F::bytes(k));
            for (int r = 0; r < R; ++r) {
                if (line) __builtin_prefetch(next + r * step);
                scale[r] = w.scale_at(row + r, w.format == Format::FP4 ? k : k & ~int64_t{127});
            }
            for (int i = 0; i < 32; i += W) {
                V a = load(x + k + i);
                for (int r = 0; r < R; ++r) total[r] += a * (F::read(p + r * step, k + i) * scale[r]);
            }
        }
    } else {
        constexpr int kLine = 64 / static_cast<int>(F::bytes(W));  // vectors of a cache line
        int64_t k = 0;
        for (; k + kLine * W <= w.columns; k += kLine * W) {
            const uint8_t* next = p + fetch_at(R, step, F::bytes(k));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                __builtin_prefetch(next + r * step);
#pragma GCC unroll 8
                for (int i = 0; i < kLine; ++i) total[r] += load(x + k + i * W) * F::read(p + r * step, k + i * W);
            }
        }
        for (; k + W <= w.columns; k += W)
            for (int r = 0; r < R; ++r) total[r] += load(x + k) * F::read(p + r * step, k);
        if (k < w.columns) {
            V a = load(x + k);
            for (int r = 0; r < R; ++r) {
                uint8_t tail[W * 4] = {};
                std::memcpy(tail, p + r * step + F::bytes(k), F::bytes(w.columns - k));
                total[r] += a * F::read(tail, 0);
            }
        }
    }
    sums<R>(total, y);
}

template <typename F>
inline void stream_rows(const Matrix& w, int64_t row, int64_t rows, const float* x, float* y) {
    constexpr int R = 4;  // streams that the hardware follows; eight were a tenth slower
    int64_t r = 0;
    for (; r + R <= rows; r += R) stream_f32<F, R>(w, row + r, x, y + r);
    for (; r < rows; ++r) stream_f32<F, 1>(w, row + r, x, y + r);
}

// Rows [row, row + rows) of W for tokens [first, first + count): y[token * stride + r], r from 0.
inline void multiply(const Tokens& tokens, const Matrix& w, int64_t row, int64_t rows, int64_t first, int64_t count,
                     float* y, int64_t stride) {
    Arena::Scope scope(Arena::mine());
#if defined(V4_BF16)
    const uint16_t* packed = w.format == Format::FP8   ? tokens.fp8_order
                             : w.format == Format::FP4 ? tokens.fp4_order : nullptr;
    const int64_t columns = w.columns;
    while (packed && rows > 0) {
        int64_t tile = std::min(rows, kTile - row % kTile);
        if (!fits_bf16(w, row, tile)) break;
        if (count == 1) {
            static const Fp8Decoder fp8;
            static const Fp4Decoder fp4;
            const uint16_t* x = packed + first * columns;
            float* out = y + first * stride;
            int64_t r = 0;
            if (w.format == Format::FP4) {
                for (; r + 8 <= tile; r += 8) stream_fp4<8>(fp4, w, row + r, x, out + r);
                for (; r < tile; ++r) stream_fp4<1>(fp4, w, row + r, x, out + r);
            } else {
                // The scale of these rows goes to the token instead: as exact, and done once.
                uint16_t* scaled = Arena::mine().get<uint16_t>(columns);
                const uint8_t* s = w.scale + (row / 128) * (columns / 128);
                for (int64_t k = 0; k < columns; k += 32)
                    _mm512_storeu_si512(scaled + k, scale_bf16(_mm512_loadu_si512(x + k), exponent_words(s[k / 128])));
                for (; r + 8 <= tile; r += 8) stream_fp8<8>(fp8, w, row + r, scaled, out + r);
                for (; r < tile; ++r) stream_fp8<1>(fp8, w, row + r, scaled, out + r);
            }
        } else {
            static const Fp8Decoder fp8;
            static const Fp4Decoder fp4;
            uint16_t* decoded = Arena::mine().get<uint16_t>(kTile * columns);
            for (int64_t r = 0; r < tile; ++r) {
                const uint8_t* p = w.row(row + r);
                for (int64_t k = 0; k < columns; k += 64) {
                    __m512i a, b;
                    if (w.format == Format::FP4) {
                        fp4.pair(p + k / 2, w.scale + (row + r) * (columns / 32) + k / 32, a, b);
                    } else {
                        fp8.pair(p + k, a, b);
                        __m512i e = exponent_words(w.scale[((row + r) / 128) * (columns / 128) + k / 128]);
                        a = scale_bf16(a, e), b = scale_bf16(b, e);
                    }
                    _mm512_storeu_si512(decoded + r * columns + k, a);
                    _mm512_storeu_si512(decoded + r * columns + k + 32, b);
                }
            }
            const uint16_t* x = packed + first * columns;
            float* out = y + first * stride;
            blocks(count, tile, [&](auto M, auto N, int64_t m, int64_t n) {
                block_bf16<M(), N()>(x + m * columns, columns, decoded + n * columns, out + m * stride + n, stride);
            });
        }
        row += tile;
        rows -= tile;
        y += tile;
    }
    if (rows == 0) return;
#endif
    const float* x = tokens.x + first * tokens.padded;
    float* out = y + first * stride;
    if (count == 1) {
        switch (w.format) {
            case Format::F32: return stream_rows<F32Weights>(w, row, rows, x, out);
            case Format::BF16: return stream_rows<BF16Weights>(w, row, rows, x, out);
            case Format::FP8: return stream_rows<Fp8Weights>(w, row, rows, x, out);
            case Format::FP4: return stream_rows<Fp4Weights>(w, row, rows, x, out);
        }
    }
    const int64_t padded = round_up(w.columns, W);
    const bool in_place = w.format == Format::F32 && padded == w.columns;
    float* decoded = in_place ? nullptr : Arena::mine().get<float>(kTile * padded);
    for (int64_t r = 0; r < rows; r += kTile) {
        int64_t tile = std::min(kTile, rows - r);
        const float* from = reinterpret_cast<const float*>(w.row(row + r));
        if (!in_place) {
            for (int64_t i = 0; i < tile; ++i) decode_row(w, row + r + i, decoded + i * padded);
            from = decoded;
        }
        blocks(count, tile, [&](auto M, auto N, int64_t m, int64_t n) {
            block_f32<M(), N()>(x + m * tokens.padded, tokens.padded, from + n * padded, padded, padded,
                            out + m * stride + r + n, stride);
        });
    }
}

// Tokens as they are; copied only where their rows must be padded.
inline Tokens plain_tokens(Arena& arena, const float* x, int64_t count, int64_t columns) {
    Tokens tokens{x, count, columns, columns};
    if (columns % W) {
        tokens.padded = round_up(columns, W);
        float* copy = arena.get<float>(count * tokens.padded);
        for (int64_t m = 0; m < count; ++m) {
            std::memcpy(copy + m * tokens.padded, x + m * columns, columns * sizeof(float));
            std::fill(copy + m * tokens.padded + columns, copy + (m + 1) * tokens.padded, 0.0f);
        }
        tokens.x = copy;
    }
    return tokens;
}

// Tokens rounded to FP8; `fp8` and `fp4` say for which weights.
inline Tokens rounded_tokens(Arena& arena, Pool& pool, const float* x, int64_t count, int64_t columns, bool fp8,
                             bool fp4) {
    Tokens tokens{nullptr, count, columns, columns};
    float* rounded = arena.get<float>(count * columns);
    tokens.x = rounded;
#if defined(V4_BF16)
    uint16_t* order8 = fp8 ? arena.get<uint16_t>(count * columns) : nullptr;
    uint16_t* order4 = fp4 ? arena.get<uint16_t>(count * columns) : nullptr;
    std::atomic<bool> fits{true};
#else
    (void)fp8, (void)fp4;
#endif
    const int64_t group = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
    pool.run((count + group - 1) / group, [&](int64_t task) {
        for (int64_t m = task * group; m < std::min(count, (task + 1) * group); ++m) {
            for (int64_t k = 0; k < columns; k += 128) round_fp8(x + m * columns + k, rounded + m * columns + k, 128);
#if defined(V4_BF16)
            V peak{};
            for (int64_t k = 0; k < columns; k += W) peak = maximum(peak, absolute(load(rounded + m * columns + k)));
            if (!(largest(peak) < kLargest)) fits = false;
            pack_bf16(rounded + m * columns, columns, fp8 ? order8 + m * columns : nullptr,
                      fp4 ? order4 + m * columns : nullptr);
#endif
        }
    });
#if defined(V4_BF16)
    if (fits) tokens.fp8_order = order8, tokens.fp4_order = order4;
#endif
    return tokens;
}

struct Product {
    const Tokens* tokens;
    Matrix weight;
    float* y;
    int64_t stride;
};

// All products at once, so that the threads share their tiles.
inline void multiply_all(Pool& pool, std::initializer_list<Product> products) {
    struct Task {
        const Product* product;
        int64_t row, rows, first, count;
    };
    std::vector<Task> tasks;
    for (const Product& product : products) {
        const Matrix& w = product.weight;
        const int64_t count = product.tokens->count;
        // Enough work for a task to be worth its start, which a single token's finds nothing fetched for; enough tasks
        // for all threads.
        int64_t rows = kTile;
        const int64_t least = count == 1 ? 524288 : 32768;
        while (rows * w.row_bytes() < least && rows * pool.threads() * 4 < w.rows) rows *= 2;
        const int64_t tiles = (w.rows + rows - 1) / rows;
        int64_t parts = tiles >= 2 * pool.threads() ? 1 : (2 * pool.threads() + tiles - 1) / tiles;
        int64_t tokens = std::max<int64_t>(std::max<int64_t>(1, 24 / kBlockM) * kBlockM, (count + parts - 1) / parts);
        // At most what stays in the cache while the tiles pass.
        tokens = round_up(std::min<int64_t>(tokens, 768), kBlockM);
        for (int64_t m = 0; m < count; m += tokens)
            for (int64_t r = 0; r < w.rows; r += rows)
                tasks.push_back({&product, r, std::min(rows, w.rows - r), m, std::min(tokens, count - m)});
    }
    pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
        const Task& task = tasks[i];
        const Product& p = *task.product;
        multiply(*p.tokens, p.weight, task.row, task.rows, task.first, task.count, p.y + task.row, p.stride);
    });
}
