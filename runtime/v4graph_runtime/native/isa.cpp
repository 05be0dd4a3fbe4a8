// The kernels for one instruction set: compiled once for each, with V4_ISA its namespace and the compiler's flags.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "call.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define V4_BF16 1
#endif

#define V4_TEXT(x) #x
#define V4_STRING(x) V4_TEXT(x)

namespace v4 {
namespace V4_ISA {
namespace {

#include "vec.h"
#include "weights.h"
#include "bf16.h"
#include "matmul.h"
#include "rows.h"
#include "hyper.h"
#include "projections.h"
#include "experts.h"
#include "prep.h"
#include "attention.h"
#include "index_keys.h"
#include "index.h"

bool supported() {
#if defined(V4_BF16)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
#elif defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return true;
#endif
}

#define V4_ENTRY(name, inputs, outputs, attributes) name,
const Kernel kTable[] = {V4_OPS(V4_ENTRY)};

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels{V4_STRING(V4_ISA), supported, kTable};

}  // namespace V4_ISA
}  // namespace v4
