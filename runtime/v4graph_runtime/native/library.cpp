// Registration with onnxruntime: one custom op per name, bound to the kernels of the best instruction set.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "call.h"
#include "ort_abi.h"

#define V4_EXPORT extern "C" __attribute__((visibility("default")))

namespace v4 {

namespace plain { extern const Kernels kKernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kKernels; }
namespace avx512 { extern const Kernels kKernels; }
namespace avx512_bf16 { extern const Kernels kKernels; }
#endif

namespace {

struct Definition {
    const char* name;
    int inputs;
    const char* outputs;
    const char* attributes;
};

#define V4_DEFINITION(name, inputs, outputs, attributes) {#name, inputs, outputs, attributes},
constexpr Definition kOps[] = {V4_OPS(V4_DEFINITION)};
constexpr int kOpCount = sizeof kOps / sizeof kOps[0];

const Kernels* const kSets[] = {
#if defined(__x86_64__)
    &avx512_bf16::kKernels, &avx512::kKernels, &avx2::kKernels,
#endif
    &plain::kKernels,
};

std::mutex g_lock;
int g_threads = 0;
std::string g_isa;
std::set<std::string> g_names;
ort::Api g_api{};
std::string g_text;

const Kernels* chosen_set() {
    for (const Kernels* one : kSets)
        if (g_isa.empty() ? one->supported() : g_isa == one->isa) return one->supported() ? one : nullptr;
    return nullptr;
}

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void check(OrtStatus* status) {
    if (!status) return;
    g_api.release(status);
    throw Failure("onnxruntime refused a call of its C API");
}

class OrtCall final : public Call {
  public:
    OrtCall(const Attributes& attributes, Pool& pool, OrtKernelContext* context, int inputs)
        : Call(attributes, pool), context_(context), inputs_(inputs) {}

    const Tensor& in(int index) override {
        Tensor& tensor = tensors_[index];
        if (read_[index]) return tensor;
        if (index >= inputs_) throw std::logic_error("an input that the op does not have");
        const OrtValue* value = nullptr;
        check(g_api.input(context_, index, &value));
        OrtTensorTypeAndShapeInfo* info = nullptr;
        check(g_api.shape(value, &info));
        int type = 0;
        size_t rank = 0;
        OrtStatus* status = g_api.type(info, &type);
        if (!status) status = g_api.rank(info, &rank);
        if (!status && rank <= 6) status = g_api.dims(info, tensor.dims, rank);
        g_api.release(info);
        check(status);
        if (rank > 6) throw Failure("an input of more than six dimensions");
        check(g_api.data(const_cast<OrtValue*>(value), &tensor.data));
        tensor.type = static_cast<Type>(type);
        tensor.rank = static_cast<int>(rank);
        read_[index] = true;
        return tensor;
    }

    Tensor out(int index, std::initializer_list<int64_t> dims) override {
        OrtValue* value = nullptr;
        check(g_api.output(context_, index, dims.begin(), dims.size(), &value));
        Tensor tensor;
        check(g_api.data(value, &tensor.data));
        tensor.rank = static_cast<int>(dims.size());
        std::copy(dims.begin(), dims.end(), tensor.dims);
        return tensor;
    }

  private:
    OrtKernelContext* context_;
    int inputs_;
    Tensor tensors_[20];
    bool read_[20] = {};
};

struct Op;

struct Node {
    const Op* op;
    Attributes attributes;
    std::shared_ptr<Pool> pool;
    Kernel kernel;
};

// The C struct comes first: onnxruntime hands it back.
struct Op {
    ort::CustomOp abi{};
    std::string name;
    const Definition* definition;
    Kernel kernel;
    int threads;
};

const Op* op_of(const ort::CustomOp* abi) { return reinterpret_cast<const Op*>(abi); }

OrtStatus* create_node(const ort::CustomOp* abi, ort::Table, const OrtKernelInfo* info, void** out) {
    const Op* op = op_of(abi);
    auto node = std::make_unique<Node>();
    node->op = op;
    node->kernel = op->kernel;
    Attributes& a = node->attributes;
    for (const char* key = op->definition->attributes; *key; ++key) {
        OrtStatus* status = nullptr;
        char text[32] = {};
        size_t size = sizeof text;
        switch (*key) {
            case 'e': status = g_api.attribute(info, "eps", &a.eps); break;
            case 'h': status = g_api.attribute(info, "hc_eps", &a.hc_eps); break;
            case 'l': status = g_api.attribute(info, "limit", &a.limit); break;
            case 's': status = g_api.attribute(info, "scale", &a.scale); break;
            case 'n': status = g_api.attribute(info, "iters", &a.iters); break;
            case 'q': status = g_api.attribute(info, "quantise", &a.quantise); break;
            case 'o': status = g_api.attribute(info, "overlap", &a.overlap); break;
            case 'w': status = g_api.attribute(info, "window", &a.window); break;
            case 'r': status = g_api.attribute(info, "ratio", &a.ratio); break;
            case 'k': status = g_api.attribute(info, "topk", &a.topk); break;
            case 'g': status = g_api.attribute(info, "groups", &a.groups); break;
            case 't':
                status = g_api.attribute(info, "quantise", text, &size);
                a.rounding = text;
                break;
        }
        if (status) return status;
    }
    node->pool = Pool::shared(op->threads);
    *out = node.release();
    return nullptr;
}

OrtStatus* compute_node(void* kernel, OrtKernelContext* context) {
    auto* node = static_cast<Node*>(kernel);
    std::string why;
    try {
        OrtCall call(node->attributes, *node->pool, context, node->op->definition->inputs);
        node->kernel(call);
        return nullptr;
    } catch (const std::exception& error) {
        why = error.what();
    } catch (...) {
        why = "unknown error";
    }
    return g_api.create_status(ort::kFail, (node->op->name + ": " + why).c_str());
}

int output_type(const ort::CustomOp* abi, size_t index) {
    return op_of(abi)->definition->outputs[index] == 'i' ? ort::kInt32 : ort::kFloat;
}

// Registered ops live as long as the process: sessions refer to them.
const Op* make_op(const std::string& name, const Definition* definition, const Kernels* set) {
    auto* op = new Op;
    op->name = name;
    op->definition = definition;
    op->kernel = set->table[definition - kOps];
    op->threads = g_threads > 0 ? g_threads : std::max(1u, std::thread::hardware_concurrency());
    ort::CustomOp& abi = op->abi;
    abi.version = ort::kApiVersion;
    abi.name = [](const ort::CustomOp* o) { return op_of(o)->name.c_str(); };
    abi.provider = [](const ort::CustomOp*) -> const char* { return "CPUExecutionProvider"; };
    abi.input_type = [](const ort::CustomOp*, size_t) -> int { return ort::kAny; };
    abi.input_count = [](const ort::CustomOp* o) -> size_t { return op_of(o)->definition->inputs; };
    abi.output_type = output_type;
    abi.output_count = [](const ort::CustomOp* o) -> size_t { return std::strlen(op_of(o)->definition->outputs); };
    abi.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    abi.input_characteristic = [](const ort::CustomOp*, size_t) { return 0; };   // required
    abi.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
    abi.input_memory = [](const ort::CustomOp*, size_t) { return 0; };           // default
    // Inputs of any type, each its own.
    abi.input_min_arity = [](const ort::CustomOp*) { return 1; };
    abi.input_homogeneity = [](const ort::CustomOp*) { return 0; };
    abi.output_min_arity = [](const ort::CustomOp*) { return 1; };
    abi.output_homogeneity = [](const ort::CustomOp*) { return 0; };
    abi.create_kernel_v2 = create_node;
    abi.compute_v2 = compute_node;
    abi.start_version = [](const ort::CustomOp*) { return 1; };
    abi.end_version = [](const ort::CustomOp*) { return 0x7fffffff; };
    return op;
}

const Definition* definition_of(const std::string& name) {
    const std::string base = name.substr(0, name.find("__"));
    for (const Definition& one : kOps)
        if (base == one.name) return &one;
    return nullptr;
}

}  // namespace
}  // namespace v4

// What the next registration uses. `names`: op types with a space between, variants with their tags; those that
// are unknown are left to their bodies. `isa`: "" for the best. Returns 0, or 1 if the machine lacks the set.
V4_EXPORT int v4graph_cpu_configure(const char* names, int threads, const char* isa) {
    std::lock_guard<std::mutex> guard(v4::g_lock);
    v4::g_names.clear();
    std::string word;
    for (const char* c = names;; ++c) {
        if (*c && *c != ' ') {
            word += *c;
            continue;
        }
        if (!word.empty()) v4::g_names.insert(word);
        word.clear();
        if (!*c) break;
    }
    v4::g_threads = threads;
    v4::g_isa = isa;
    return v4::chosen_set() ? 0 : 1;
}

// Instruction sets that this machine runs, best first, with a space between.
V4_EXPORT const char* v4graph_cpu_sets() {
    std::lock_guard<std::mutex> guard(v4::g_lock);
    v4::g_text.clear();
    for (const v4::Kernels* one : v4::kSets)
        if (one->supported()) v4::g_text += (v4::g_text.empty() ? "" : " ") + std::string(one->isa);
    return v4::g_text.c_str();
}

// What the library was compiled from, to tell one that is out of date.
V4_EXPORT const char* v4graph_cpu_sources() { return V4_SOURCES; }

// The ops with kernels: "name inputs outputs attributes" per line.
V4_EXPORT const char* v4graph_cpu_ops() {
    std::lock_guard<std::mutex> guard(v4::g_lock);
    v4::g_text.clear();
    for (const auto& op : v4::kOps)
        v4::g_text += std::string(op.name) + " " + std::to_string(op.inputs) + " " + op.outputs + " " + op.attributes + "\n";
    return v4::g_text.c_str();
}

// Reads `bytes` of memory once with so many threads, as fast as it comes: the ceiling of a decoded token.
// Returns a checksum, so that nothing is left out.
V4_EXPORT uint64_t v4graph_cpu_read(const void* memory, uint64_t bytes, int threads) {
    constexpr int64_t kPiece = 1 << 20, kLanes = 16;
    const int64_t words = static_cast<int64_t>(bytes / 8);
    const auto* from = static_cast<const uint64_t*>(memory);
    std::atomic<uint64_t> total{0};
    v4::Pool::shared(threads)->run((words + kPiece - 1) / kPiece, [&](int64_t piece) {
        uint64_t lanes[kLanes] = {};
        const int64_t end = std::min(words, (piece + 1) * kPiece);
        int64_t i = piece * kPiece;
        for (; i + kLanes <= end; i += kLanes) {
            __builtin_prefetch(from + i + 512);
            __builtin_prefetch(from + i + 520);
            for (int64_t j = 0; j < kLanes; ++j) lanes[j] ^= from[i + j];
        }
        uint64_t mine = 0;
        for (uint64_t lane : lanes) mine ^= lane;
        total ^= mine;
    });
    return total;
}

V4_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const ort::ApiBase* base) {
    std::lock_guard<std::mutex> guard(v4::g_lock);
    ort::Table table = base->get_api(ort::kApiVersion);
    if (!table) {
        // No table of that version: the oldest one still makes a status.
        ort::Api oldest{base->get_api(1)};
        std::string text = std::string("v4graph's CPU kernels need onnxruntime 1.18 or newer, this is ") + base->version();
        return oldest.create_status(ort::kFail, text.c_str());
    }
    v4::g_api = ort::Api{table};
    const v4::Kernels* set = v4::chosen_set();
    if (!set) return v4::g_api.create_status(ort::kFail, "this machine lacks the instruction set that was asked for");
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* status = v4::g_api.create_domain("v4graph", &domain)) return status;
    for (const auto& op : v4::kOps) v4::g_names.insert(op.name);
    for (const std::string& name : v4::g_names) {
        const v4::Definition* definition = v4::definition_of(name);
        if (!definition) continue;
        if (OrtStatus* status = v4::g_api.add_op(domain, &v4::make_op(name, definition, set)->abi)) return status;
    }
    return v4::g_api.add_domain(options, domain);
}
