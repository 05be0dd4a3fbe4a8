// Stored matrices and tokens, as all products take them.

enum class Format { F32, BF16, FP8, FP4 };

struct Matrix {
    Format format;
    const uint8_t* data;
    int64_t rows, columns;
    const uint8_t* scale = nullptr;  // e8m0: per 128x128 for FP8, per 32 columns of a row for FP4
    const float* scale_f32 = nullptr;

    int64_t row_bytes() const {
        return format == Format::F32 ? 4 * columns : format == Format::BF16 ? 2 * columns
               : format == Format::FP8 ? columns : columns / 2;
    }
    const uint8_t* row(int64_t r) const { return data + r * row_bytes(); }
    // Scale of a row's columns from k on; k is a multiple of 128 (FP8) or 32 (FP4).
    float scale_at(int64_t r, int64_t k) const {
        if (format == Format::FP4) return e8m0(scale[r * (columns / 32) + k / 32]);
        int64_t at = (r / 128) * ((columns + 127) / 128) + k / 128;
        return scale_f32 ? scale_f32[at] : e8m0(scale[at]);
    }
    Matrix part(int64_t index) const {  // of matrices [E, rows, columns]
        Matrix one = *this;
        one.data += index * rows * row_bytes();
        int64_t scales = format == Format::FP4 ? rows * (columns / 32)
                                               : ((rows + 127) / 128) * ((columns + 127) / 128);
        if (scale) one.scale += index * scales;
        if (scale_f32) one.scale_f32 += index * scales;
        return one;
    }
};

inline Matrix matrix_of(const Tensor& weight, const Tensor* scale = nullptr, bool fp4 = false) {
    Matrix m{};
    m.data = weight.bytes();
    m.rows = weight[-2];
    m.columns = weight[-1] * (fp4 ? 2 : 1);
    m.format = fp4 ? Format::FP4
               : scale ? Format::FP8
               : weight.type == Type::BF16 ? Format::BF16 : Format::F32;
    if (scale && scale->type == Type::F32) m.scale_f32 = scale->f32();
    else if (scale) m.scale = scale->bytes();
    if (scale && m.columns % 128) throw std::invalid_argument("quantised weights need a multiple of 128 columns");
    return m;
}

// Tokens [m, columns]; `round` says that they are rounded to FP8 in blocks of 128 first.
struct Tokens {
    const float* x = nullptr;
    int64_t count = 0, columns = 0, padded = 0;  // `padded`: floats from one token to the next
    const uint16_t* fp8_order = nullptr;         // bfloat16, in the order that the decoders give
    const uint16_t* fp4_order = nullptr;
};

constexpr int64_t kTile = 32;  // rows of a tile; divides 128

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What to fetch while byte `at` of `rows` rows is read together: 2048 bytes on, or as far on in the next rows.
inline int64_t fetch_at(int64_t rows, int64_t row_bytes, int64_t at) {
    const int64_t next = at + std::min<int64_t>(2048, row_bytes);
    return next < row_bytes ? next : next + (rows - 1) * row_bytes;
}
