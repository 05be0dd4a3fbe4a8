// What a kernel sees of one call: inputs, outputs and attributes, without onnxruntime's types.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace v4 {

enum class Type : int { F32 = 1, I8 = 3, I32 = 6, I64 = 7, BF16 = 16 };

struct Tensor {
    void* data = nullptr;
    Type type = Type::F32;
    int rank = 0;
    int64_t dims[6] = {};

    int64_t operator[](int axis) const { return dims[axis < 0 ? rank + axis : axis]; }
    const float* f32() const { return static_cast<const float*>(data); }
    float* f32() { return static_cast<float*>(data); }
    const int32_t* i32() const { return static_cast<const int32_t*>(data); }
    int32_t* i32() { return static_cast<int32_t*>(data); }
    const int64_t* i64() const { return static_cast<const int64_t*>(data); }
    const uint8_t* bytes() const { return static_cast<const uint8_t*>(data); }
    int64_t size() const {
        int64_t count = 1;
        for (int i = 0; i < rank; ++i) count *= dims[i];
        return count;
    }
    // Product of all dimensions but the last.
    int64_t rows() const { return rank ? size() / (dims[rank - 1] ? dims[rank - 1] : 1) : 1; }
};

struct Attributes {
    float eps = 0, hc_eps = 0, limit = 0, scale = 0;
    int64_t iters = 0, quantise = 0, overlap = 0, window = 0, ratio = 0, topk = 0, groups = 0;
    std::string rounding;  // V4Compress calls its string "quantise", too
};

// One call. `in` is read at once; `out` makes an output when its shape is known.
class Call {
  public:
    Call(const Attributes& attributes, Pool& threads) : attributes(attributes), pool(threads) {}
    virtual ~Call() = default;
    virtual const Tensor& in(int index) = 0;
    virtual Tensor out(int index, std::initializer_list<int64_t> dims) = 0;

    const Attributes& attributes;
    Pool& pool;
};

using Kernel = void (*)(Call&);

// The kernels of one instruction set, in the order of `kOps`.
struct Kernels {
    const char* isa;
    bool (*supported)();
    const Kernel* table;
};

// X(name, number of inputs, types of the outputs, attributes): `f` float32, `i` int32.
// Attributes: e eps, h hc_eps, l limit, s scale, n iters, q quantise, t quantise as text, o overlap,
// w window, r ratio, k topk, g groups.
#define V4_OPS(X)                                \
    X(V4HyperPre, 5, "fff", "neh")               \
    X(V4HyperPost, 4, "f", "")                   \
    X(V4HyperHead, 5, "f", "eh")                 \
    X(V4RmsNorm, 2, "f", "e")                    \
    X(V4Linear, 2, "f", "")                      \
    X(V4LinearF32, 2, "f", "")                   \
    X(V4Fp8Linear, 3, "f", "")                   \
    X(V4AttentionPrep, 5, "ff", "qe")            \
    X(V4Compress, 10, "fff", "ote")              \
    X(V4IndexTopK, 5, "i", "krqs")               \
    X(V4WindowAttention, 7, "ff", "ws")          \
    X(V4CompressedAttention, 8, "ff", "wrs")     \
    X(V4SelectedAttention, 9, "ff", "ws")        \
    X(V4GroupedOutput, 2, "f", "g")              \
    X(V4Fp8GroupedOutput, 3, "f", "g")           \
    X(V4RouteTopK, 3, "if", "ks")                \
    X(V4RouteHash, 4, "if", "s")                 \
    X(V4MoE, 15, "f", "l")                       \
    X(V4MoEFp8, 15, "f", "l")                    \
    X(V4MoEFloat, 9, "f", "l")                   \
    X(V4ExpertFp4, 8, "f", "l")                  \
    X(V4ExpertFp8, 8, "f", "l")                  \
    X(V4ExpertFloat, 5, "f", "l")                \
    X(V4HyperPostPre, 8, "ffff", "neh")          \
    X(V4WindowProjections, 5, "ff", "")          \
    X(V4HcaProjections, 7, "ffff", "")           \
    X(V4CsaProjections, 10, "fffffff", "")       \
    X(V4QueryProjection, 4, "f", "e")            \
    X(V4CsaQueryProjections, 6, "ff", "e")       \
    X(V4HcaPrep, 13, "fffff", "e")               \
    X(V4CsaPrep, 20, "ffffffff", "e")

}  // namespace v4
