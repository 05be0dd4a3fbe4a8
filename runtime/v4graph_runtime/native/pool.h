// Threads that share one op's work, and memory that is kept from call to call.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace v4 {

// Runs the tasks 0..count-1 of a call on `threads` threads, the caller among them. Idle threads spin for a
// while, since the next op follows within microseconds, then sleep.
class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Tasks are taken one at a time in order; the first exception is thrown again here.
    void run(int64_t count, const std::function<void(int64_t)>& task);

    // The pool of so many threads, shared by all kernels that ask for it.
    static std::shared_ptr<Pool> shared(int threads);

  private:
    void work();
    void take(const std::function<void(int64_t)>& task, int64_t count);

    std::vector<std::thread> workers_;
    std::mutex one_call_, sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> inside_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<bool> stop_{false}, open_{false};
    int sleepers_ = 0;
    const std::function<void(int64_t)>* task_ = nullptr;
    int64_t count_ = 0;
    std::exception_ptr error_;
    std::mutex error_lock_;
};

// Memory of a call: pieces given out in order, all of it given back at the end of a scope.
class Arena {
  public:
    // 64-byte aligned, not initialised.
    template <typename T>
    T* get(int64_t count) {
        size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 63) & ~size_t{63};
        while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size) {
            ++block_;
            used_ = 0;
        }
        if (block_ == blocks_.size()) {
            size_t size = bytes > kBlock ? bytes : kBlock;
            void* memory = std::aligned_alloc(64, (size + 63) & ~size_t{63});
            if (!memory) throw std::bad_alloc();
            blocks_.push_back({memory, size});
            used_ = 0;
        }
        T* piece = reinterpret_cast<T*>(static_cast<char*>(blocks_[block_].memory) + used_);
        used_ += bytes;
        return piece;
    }

    // The calling thread's own.
    static Arena& mine();
    ~Arena() {
        for (auto& block : blocks_) std::free(block.memory);
    }

    class Scope {
      public:
        explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_) {}
        ~Scope() {
            arena_.block_ = block_;
            arena_.used_ = used_;
            if (block_ == 0 && used_ == 0) arena_.shrink();
        }
        Scope(const Scope&) = delete;
        Scope& operator=(const Scope&) = delete;

      private:
        Arena& arena_;
        size_t block_, used_;
    };

  private:
    static constexpr size_t kBlock = size_t{4} << 20;
    // Kept between calls: what decoding needs. A long prompt's buffers go back.
    static constexpr size_t kKept = size_t{32} << 20;
    struct Block {
        void* memory;
        size_t size;
    };

    void shrink() {
        size_t total = 0;
        for (size_t i = 0; i < blocks_.size(); ++i) {
            total += blocks_[i].size;
            if (total <= kKept) continue;
            for (size_t j = i; j < blocks_.size(); ++j) std::free(blocks_[j].memory);
            blocks_.resize(i);
        }
    }

    std::vector<Block> blocks_;
    size_t block_ = 0, used_ = 0;
};

}  // namespace v4
