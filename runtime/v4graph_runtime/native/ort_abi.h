// The part of onnxruntime's C ABI that a custom-op library needs, by position in its append-only tables.
// Positions hold from API version 18 on; `library.cpp` asks for that version and refuses to load without it.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

namespace ort {

constexpr uint32_t kApiVersion = 18;
constexpr int kFail = 1;  // ORT_FAIL

// ONNXTensorElementDataType; kAny lets an input have any type.
enum Type : int { kAny = 0, kFloat = 1, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBFloat16 = 16 };

// OrtApi is a table of function pointers: what is used, and where it stands.
using Table = void* const*;

struct ApiBase {
    Table (*get_api)(uint32_t version);
    const char* (*version)();
};

struct Api {
    Table table;

    template <typename F>
    F at(int position) const { return reinterpret_cast<F>(table[position]); }

    OrtStatus* create_status(int code, const char* text) const {
        return at<OrtStatus* (*)(int, const char*)>(0)(code, text);
    }
    void release(OrtStatus* status) const { at<void (*)(OrtStatus*)>(93)(status); }
    OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const {
        return at<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(26)(name, out);
    }
    OrtStatus* add_op(OrtCustomOpDomain* domain, const struct CustomOp* op) const {
        return at<OrtStatus* (*)(OrtCustomOpDomain*, const struct CustomOp*)>(27)(domain, op);
    }
    OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
        return at<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
    }
    OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* out) const {
        return at<OrtStatus* (*)(const OrtKernelInfo*, const char*, float*)>(85)(info, name, out);
    }
    OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* out) const {
        return at<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
    }
    OrtStatus* attribute(const OrtKernelInfo* info, const char* name, char* out, size_t* size) const {
        return at<OrtStatus* (*)(const OrtKernelInfo*, const char*, char*, size_t*)>(87)(info, name, out, size);
    }
    OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
        return at<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, out);
    }
    OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank,
                      OrtValue** out) const {
        using F = OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
        return at<F>(91)(context, index, dims, rank, out);
    }
    OrtStatus* data(OrtValue* value, void** out) const {
        return at<OrtStatus* (*)(OrtValue*, void**)>(51)(value, out);
    }
    OrtStatus* shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
        return at<OrtStatus* (*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, out);
    }
    OrtStatus* type(const OrtTensorTypeAndShapeInfo* info, int* out) const {
        return at<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int*)>(60)(info, out);
    }
    OrtStatus* rank(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
        return at<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, out);
    }
    OrtStatus* dims(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t rank) const {
        return at<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, out, rank);
    }
    void release(OrtTensorTypeAndShapeInfo* info) const {
        at<void (*)(OrtTensorTypeAndShapeInfo*)>(99)(info);
    }
};

// OrtCustomOp: read by onnxruntime up to what `version` says it has. Unused callbacks are null.
struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, Table, const OrtKernelInfo*);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    int (*input_type)(const CustomOp*, size_t);
    size_t (*input_count)(const CustomOp*);
    int (*output_type)(const CustomOp*, size_t);
    size_t (*output_count)(const CustomOp*);
    void (*compute)(void*, OrtKernelContext*);
    void (*destroy)(void*);
    int (*input_characteristic)(const CustomOp*, size_t);
    int (*output_characteristic)(const CustomOp*, size_t);
    int (*input_memory)(const CustomOp*, size_t);
    int (*input_min_arity)(const CustomOp*);
    int (*input_homogeneity)(const CustomOp*);
    int (*output_min_arity)(const CustomOp*);
    int (*output_homogeneity)(const CustomOp*);
    OrtStatus* (*create_kernel_v2)(const CustomOp*, Table, const OrtKernelInfo*, void**);
    OrtStatus* (*compute_v2)(void*, OrtKernelContext*);
    OrtStatus* (*infer_shape)(const CustomOp*, void*);
    int (*start_version)(const CustomOp*);
    int (*end_version)(const CustomOp*);
    size_t (*may_inplace)(int**, int**);
    void (*release_may_inplace)(int*, int*);
    size_t (*alias_map)(int**, int**);
    void (*release_alias_map)(int*, int*);
};

}  // namespace ort
