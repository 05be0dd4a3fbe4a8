// Fibres, their scheduler, and the warp-wide instructions; linked into every emulated unit.
#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

State state;
Fibre* current;

std::vector<Entry*>& Entry::entries() {
  static std::vector<Entry*> all;
  return all;
}

namespace {

constexpr size_t STACK = 128 << 10;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t SHARED_LIMIT = 256 << 10;

std::vector<Fibre> fibres;
std::vector<Fibre*> ready;
std::vector<Fibre*> at_barrier;
unsigned alive;
unsigned long long random_state;
unsigned order;  // 0: first come first served, 1: last come first served, 2: random
unsigned char* stacks;
unsigned char* shared_pages;
size_t page;
std::string error;
sigjmp_buf escape;
volatile bool running;
const Entry* entry;
void** arguments;
unsigned char signal_stack[64 << 10];

unsigned long long next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void run_thread() {
  entry->invoke(entry->function, arguments);
}

#if defined(__x86_64__)
extern "C" void v4_emu_switch(void** save, void* load);
asm(R"(
.text
.local v4_emu_switch
.type v4_emu_switch, @function
v4_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void* scheduler;
void leave() { v4_emu_switch(&current->stack_pointer, scheduler); }
void enter(Fibre& fibre) { v4_emu_switch(&scheduler, fibre.stack_pointer); }
void start();
void prepare(Fibre& fibre, unsigned char* stack) {
  void** top = reinterpret_cast<void**>(stack + STACK);
  *--top = nullptr;  // keeps the stack 16-byte aligned at the entry of start()
  *--top = reinterpret_cast<void*>(&start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fibre.stack_pointer = top;
}
#else
ucontext_t scheduler_context, contexts[MAX_THREADS];
void leave() { swapcontext(&contexts[current->thread], &scheduler_context); }
void enter(Fibre& fibre) { swapcontext(&scheduler_context, &contexts[fibre.thread]); }
void start();
void prepare(Fibre& fibre, unsigned char* stack) {
  ucontext_t& context = contexts[fibre.thread];
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
}
#endif

void wake_barrier() {
  for (Fibre* fibre : at_barrier) ready.push_back(fibre);
  at_barrier.clear();
}

void start() {
  run_thread();
  current->done = true;
  warp().alive &= ~(1u << lane());
  --alive;
  if (alive && at_barrier.size() == alive) wake_barrier();
  leave();
}

[[noreturn]] void stop(const std::string& text) {
  error = text;
  siglongjmp(escape, 1);
}

std::string place() {
  char text[200];
  snprintf(text, sizeof text, "%s, block (%u, %u, %u), thread %u", entry->name, state.block.x, state.block.y,
           state.block.z, current ? current->thread : 0);
  return text;
}

void on_signal(int number, siginfo_t* info, void*) {
  if (!running) {
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  char text[200];
  const auto* address = static_cast<unsigned char*>(info->si_addr);
  if (number == SIGILL) {
    snprintf(text, sizeof text, "a misaligned access");
  } else if (shared_pages && address >= shared_pages && address < shared_pages + SHARED_LIMIT + 2 * page) {
    snprintf(text, sizeof text, "an access outside shared memory, at byte %ld",
             static_cast<long>(address - state.shared));
  } else {
    snprintf(text, sizeof text, "an access to memory that is not there (%p)", static_cast<const void*>(address));
  }
  stop(place() + ": " + text);
}

void prepare_memory() {
  if (stacks) return;
  page = sysconf(_SC_PAGESIZE);
  auto map = [](size_t bytes) {
    return static_cast<unsigned char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  };
  stacks = map(STACK * MAX_THREADS);
  // Shared memory ends where a page begins that may not be touched.
  shared_pages = map(SHARED_LIMIT + 2 * page);
  mprotect(shared_pages + page + SHARED_LIMIT, page, PROT_NONE);
  fibres.resize(MAX_THREADS);
}

unsigned char* shared_block(size_t bytes) {
  const size_t size = (bytes + 15) / 16 * 16;
  unsigned char* base = shared_pages + page + SHARED_LIMIT - size;
  const size_t lead = static_cast<size_t>(base - shared_pages) / page * page;
  mprotect(shared_pages, lead, PROT_NONE);
  mprotect(shared_pages + lead, page + SHARED_LIMIT - lead, PROT_READ | PROT_WRITE);
  return base;
}

size_t pick() {
  if (order == 2) return next_random() % ready.size();
  return order == 1 ? ready.size() - 1 : 0;
}

void run_block(size_t shared_bytes) {
  const unsigned threads = state.block_dim.x;
  memset(state.shared, 0xff, shared_bytes);
  state.warps.resize(threads / 32);
  for (Warp& warp : state.warps) {
    warp.arrived = 0;
    warp.alive = ~0u;
    warp.kind = nullptr;
  }
  ready.clear();
  at_barrier.clear();
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    fibre.thread = i;
    fibre.index = {i, 0, 0};
    fibre.done = false;
    fibre.copies.clear();
    fibre.groups.clear();
    prepare(fibre, stacks + STACK * i);
    ready.push_back(&fibre);
  }
  alive = threads;
  size_t head = 0;  // of the queue when fibres run in order
  while (alive) {
    if (head == ready.size()) {
      current = nullptr;
      std::string stuck = std::to_string(at_barrier.size()) + " threads wait at __syncthreads";
      for (const Warp& warp : state.warps) {
        if (warp.arrived) stuck += std::string(", a warp waits at ") + warp.kind;
      }
      stop(place() + ": " + stuck + " for threads that never come");
    }
    if (order == 0) {
      current = ready[head++];
      if (head == ready.size()) ready.clear(), head = 0;
    } else {
      const size_t chosen = pick();
      current = ready[chosen];
      ready[chosen] = ready.back();
      ready.pop_back();
    }
    enter(*current);
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[400];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  stop(place() + ": " + text);
}

void barrier() {
  at_barrier.push_back(current);
  if (at_barrier.size() == alive) {
    wake_barrier();
  }
  leave();
}

void collective(const char* kind, void (*combine)(Warp&)) {
  Warp& w = warp();
  if (w.alive != ~0u) fail("%s: a lane of the warp has returned already", kind);
  if (!w.arrived) w.kind = kind;
  if (strcmp(w.kind, kind) != 0) fail("%s: another lane of the warp waits at %s", kind, w.kind);
  w.waiting[lane()] = current;
  w.arrived |= 1u << lane();
  if (w.arrived == ~0u) {
    combine(w);
    w.arrived = 0;
    for (unsigned i = 0; i < 32; ++i) {
      if (w.waiting[i] != current) ready.push_back(w.waiting[i]);
    }
    return;
  }
  leave();
}

void finish_copies(size_t groups_left) {
  auto& groups = current->groups;
  if (groups.size() <= groups_left) return;
  const size_t finished = groups.size() - groups_left, end = groups[finished - 1];
  auto& copies = current->copies;
  for (size_t i = 0; i < end; ++i) {
    if (copies[i].valid) {
      memcpy(copies[i].to, copies[i].from, 16);
    } else {
      memset(copies[i].to, 0, 16);
    }
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<long>(end));
  groups.erase(groups.begin(), groups.begin() + static_cast<long>(finished));
  for (size_t& group : groups) group -= end;
}

void combine_nothing(Warp&) {}

namespace {

float e4m3(unsigned char code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return NAN;
  const float size = exponent ? ldexpf(float(8 + mantissa), exponent - 10) : ldexpf(float(mantissa), -9);
  return code & 128 ? -size : size;
}

struct E4m3Table {
  float values[256];
  E4m3Table() {
    for (int i = 0; i < 256; ++i) values[i] = e4m3(static_cast<unsigned char>(i));
  }
};
const E4m3Table e4m3_table;

template <int K>
void multiply(Warp& w, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) {
      memcpy(w.out[row % 8 * 4 + n / 2] + (row / 8 * 2 + n % 2) * 4, &sum[n], 4);
    }
  }
}

}  // namespace

void combine_mma_bf16(Warp& w) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    unsigned r[6];
    memcpy(r, w.in[lane], sizeof r);
    for (int half = 0; half < 2; ++half) {
      auto value = [&](int i) { return __uint_as_float(half ? r[i] & 0xffff0000u : r[i] << 16); };
      a[group][pair + half] = value(0);
      a[group + 8][pair + half] = value(1);
      a[group][pair + 8 + half] = value(2);
      a[group + 8][pair + 8 + half] = value(3);
      b[pair + half][group] = value(4);
      b[pair + 8 + half][group] = value(5);
    }
  }
  multiply(w, a, b);
}

void combine_mma_e4m3(Warp& w) {
  float a[16][32], b[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, first = lane % 4 * 4;
    const unsigned char* bytes = w.in[lane];
    for (int i = 0; i < 4; ++i) {
      auto value = [&](int word) { return e4m3_table.values[bytes[4 * word + i]]; };
      a[group][first + i] = value(0);
      a[group + 8][first + i] = value(1);
      a[group][first + 16 + i] = value(2);
      a[group + 8][first + 16 + i] = value(3);
      b[first + i][group] = value(4);
      b[first + 16 + i][group] = value(5);
    }
  }
  multiply(w, a, b);
}

namespace {

const unsigned short* row_of(const Warp& w, int matrix, int row) {
  const void* address;
  memcpy(&address, w.in[matrix * 8 + row], sizeof address);
  return static_cast<const unsigned short*>(address);
}

}  // namespace

void combine_ldmatrix(Warp& w) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) memcpy(w.out[lane] + 4 * m, row_of(w, m, lane / 4) + lane % 4 * 2, 4);
  }
}

void combine_ldmatrix_trans(Warp& w) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const unsigned short pair[2] = {row_of(w, m, lane % 4 * 2)[lane / 4], row_of(w, m, lane % 4 * 2 + 1)[lane / 4]};
      memcpy(w.out[lane] + 4 * m, pair, 4);
    }
  }
}

}  // namespace emu

extern "C" {

#define V4_EXPORTED __attribute__((visibility("default")))

// Name of entry `i`, with its signature and threads; null past the last.
V4_EXPORTED const char* v4_emu_entry(int i, const char** signature, int* threads) {
  const auto& all = emu::Entry::entries();
  if (i >= static_cast<int>(all.size())) return nullptr;
  *signature = all[i]->signature.c_str();
  *threads = all[i]->threads;
  return all[i]->name;
}

// Run one launch; returns null or what went wrong.
V4_EXPORTED const char* v4_emu_launch(int i, unsigned x, unsigned y, unsigned z, unsigned block, unsigned shared,
                                      void** arguments, unsigned long long seed, int native_e4m3) {
  using namespace emu;
  prepare_memory();
  entry = Entry::entries()[i];
  emu::arguments = arguments;
  state.grid = {x, y, z};
  state.block_dim = {block, 1, 1};
  state.native_e4m3 = native_e4m3;
  state.shared = shared_block(shared);
  order = seed % 4 < 2 ? static_cast<unsigned>(seed % 4) : 2;
  random_state = seed * 0x9e3779b97f4a7c15ull + 1;
  struct sigaction action = {}, old[3];
  stack_t alternative = {}, old_stack;
  alternative.ss_sp = signal_stack;
  alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, &old_stack);
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int signals[3] = {SIGSEGV, SIGBUS, SIGILL};
  for (int s = 0; s < 3; ++s) sigaction(signals[s], &action, &old[s]);
  error.clear();
  if (!sigsetjmp(escape, 1)) {
    running = true;
    for (unsigned bz = 0; bz < z; ++bz) {
      for (unsigned by = 0; by < y; ++by) {
        for (unsigned bx = 0; bx < x; ++bx) {
          state.block = {bx, by, bz};
          run_block(shared);
        }
      }
    }
  }
  running = false;
  for (int s = 0; s < 3; ++s) sigaction(signals[s], &old[s], nullptr);
  sigaltstack(&old_stack, nullptr);
  return error.empty() ? nullptr : error.c_str();
}

}  // extern "C"
