// Linear projections, one weight a launch. Source: spec sections 2.0, 2.2, 2.4.
#include "linear.cuh"

// Rows [T, K] as FP8 weights take them, eight values a thread.
template <bool ROUND>
DEVICE void prepare_rows(const bf16* x, bf16* prepared, int parts) {
  const long i = long(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint4 value = prepare_eight<ROUND>(i < parts ? load16(x + 8 * i) : make_uint4(0, 0, 0, 0));
  if (i < parts) store16(prepared + 8 * i, value);
}

V4_KERNEL(v4_round_rows, 256, 4, const bf16* x, bf16* prepared, int parts) { prepare_rows<true>(x, prepared, parts); }
V4_KERNEL(v4_order_rows, 256, 4, const bf16* x, bf16* prepared, int parts) { prepare_rows<false>(x, prepared, parts); }

#define V4_LINEAR(name, blocks, function, out)                                                                   \
  V4_KERNEL(name, 256, blocks, const bf16* x, const bf16* weight, out* y, int T, int O, int K, int groups) {      \
    function({x, weight, nullptr, T, O, K, 0, groups}, y);                                                       \
  }
#define V4_FP8_LINEAR(name, blocks, function)                                                                    \
  V4_KERNEL(name, 256, blocks, const bf16* x, const void* weight, const void* scale, bf16* y, int T, int O, int K, \
            int scale_bytes, int groups) {                                                                       \
    function({x, weight, scale, T, O, K, scale_bytes, groups}, y);                                               \
  }
V4_LINEAR(v4_linear_8, 2, (few_tokens<Format::BF16, 1, Prepare::NOTHING, bf16>), bf16)
V4_LINEAR(v4_linear_32, 1, (few_tokens<Format::BF16, 4, Prepare::NOTHING, bf16>), bf16)
V4_LINEAR(v4_linear_many, 1, many_tokens<Format::BF16>, bf16)
V4_LINEAR(v4_linear_f32_8, 2, (few_tokens<Format::BF16, 1, Prepare::NOTHING, float>), float)
V4_LINEAR(v4_linear_f32_32, 1, (few_tokens<Format::BF16, 4, Prepare::NOTHING, float>), float)
V4_LINEAR(v4_linear_f32_many, 1, many_tokens<Format::BF16>, float)
V4_FP8_LINEAR(v4_fp8_linear_8, 2, (few_tokens<Format::FP8, 1, Prepare::NOTHING, bf16>))
V4_FP8_LINEAR(v4_fp8_linear_32, 1, (few_tokens<Format::FP8, 4, Prepare::NOTHING, bf16>))
V4_FP8_LINEAR(v4_fp8_linear_many, 1, many_tokens<Format::FP8>)
V4_FP8_LINEAR(v4_fp8_grouped_8, 2, (few_tokens<Format::FP8_ROUNDED, 1, Prepare::NOTHING, bf16>))
V4_FP8_LINEAR(v4_fp8_grouped_32, 1, (few_tokens<Format::FP8_ROUNDED, 4, Prepare::NOTHING, bf16>))

V4_KERNEL(v4_fp8_linear_inside, 256, 2, const bf16* x, const void* weight, const void* scale, bf16* y, int T, int O,
          int K, int scale_bytes, int groups, int split) {
  few_tokens<Format::FP8, 1, Prepare::ROUND, bf16>({x, weight, scale, T, O, K, scale_bytes, groups, split}, y);
}

V4_KERNEL(v4_fp8_grouped_inside, 256, 2, const bf16* x, const void* weight, const void* scale, bf16* y, int T, int O,
          int K, int scale_bytes, int groups, int split) {
  const Product product{x, weight, scale, T, O, K, scale_bytes, groups, split};
  if (scale_bytes == 1) {  // nothing to round
    few_tokens<Format::FP8, 1, Prepare::ORDER, bf16>(product, y);
  } else {
    few_tokens<Format::FP8_ROUNDED, 1, Prepare::ORDER, bf16>(product, y);
  }
}

V4_KERNEL(v4_fp8_grouped_many, 256, 1, const bf16* x, const void* weight, const void* scale, bf16* y, int T, int O,
          int K, int scale_bytes, int groups) {
  const Product product{x, weight, scale, T, O, K, scale_bytes, groups};
  if (scale_bytes == 1) {
    many_tokens<Format::FP8>(product, y);
  } else {
    many_tokens<Format::FP8_ROUNDED>(product, y);
  }
}
