#include "pool.h"

#include <chrono>
#include <map>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace v4 {

namespace {

constexpr int kSpins = 20000;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

Pool::Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(sleep_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::take(const std::function<void(int64_t)>& task, int64_t count) {
    for (int64_t i = next_.fetch_add(1); i < count; i = next_.fetch_add(1)) {
        try {
            task(i);
        } catch (...) {
            std::lock_guard<std::mutex> lock(error_lock_);
            if (!error_) error_ = std::current_exception();
            next_ = count;
        }
    }
}

void Pool::work() {
    uint64_t seen = 0;
    for (;;) {
        int spins = 0;
        while (generation_.load(std::memory_order_acquire) == seen && !stop_) {
            if (++spins < kSpins) {
                relax();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleep_);
            ++sleepers_;
            wake_.wait(lock, [&] { return generation_ != seen || stop_; });
            --sleepers_;
        }
        if (stop_) return;
        seen = generation_.load(std::memory_order_acquire);
        // A late worker finds the call closed; one that got in is waited for.
        inside_.fetch_add(1);
        if (open_.load()) take(*task_, count_);
        inside_.fetch_sub(1);
    }
}

void Pool::run(int64_t count, const std::function<void(int64_t)>& task) {
    if (workers_.empty() || count <= 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    std::lock_guard<std::mutex> one(one_call_);
    task_ = &task;
    count_ = count;
    next_ = 0;
    error_ = nullptr;
    open_ = true;
    bool asleep;
    {
        std::lock_guard<std::mutex> lock(sleep_);
        generation_.fetch_add(1, std::memory_order_release);
        asleep = sleepers_ > 0;
    }
    if (asleep) wake_.notify_all();
    take(task, count);
    open_ = false;
    while (inside_.load() != 0) relax();
    if (error_) std::rethrow_exception(error_);
}

std::shared_ptr<Pool> Pool::shared(int threads) {
    static std::mutex lock;
    static std::map<int, std::weak_ptr<Pool>> pools;
    std::lock_guard<std::mutex> guard(lock);
    auto pool = pools[threads].lock();
    if (!pool) pools[threads] = pool = std::make_shared<Pool>(threads);
    return pool;
}

Arena& Arena::mine() {
    static thread_local Arena arena;
    return arena;
}

}  // namespace v4
