// CUDA on a CPU, for tests of kernels where there is no card: a fiber for each thread, one after the other, switched
// where threads wait for each other. Shared memory starts as garbage; copies that are asked for asynchronously are made
// when they are waited for, so that a missing wait is seen. EMULATED_SEED shuffles the order of warps and blocks.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define EMULATED_SHARED static __attribute__((section("emushared")))
extern "C" char __start_emushared[], __stop_emushared[];
namespace cuda { namespace std = ::std; }

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 { unsigned x = 1, y = 1, z = 1; };

inline uint32_t __float_as_uint(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline int32_t __float_as_int(float x) { return int32_t(__float_as_uint(x)); }
inline float __uint_as_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
inline float __int_as_float(int32_t u) { return __uint_as_float(uint32_t(u)); }

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        uint32_t u = __float_as_uint(x);
        bits = x != x ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    __nv_bfloat16(int x) : __nv_bfloat16(float(x)) {}
    __nv_bfloat16(double x) : __nv_bfloat16(float(x)) {}
    operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct __half {
    uint16_t bits;
    __half() = default;
    __half(float x) { _Float16 h = _Float16(x); memcpy(&bits, &h, 2); }
    __half(int x) : __half(float(x)) {}
    __half(double x) : __half(float(x)) {}
    operator float() const { _Float16 h; memcpy(&h, &bits, 2); return float(h); }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half2 { __half x, y; };
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }

namespace emulated {

struct Fiber;
struct Meeting {  // of a warp's lanes, a block's threads or a grid's blocks
    unsigned arrived = 0, size = 0, generation = 0;
    void* slots[1024];
    std::function<void()> act;
};
struct Block {
    dim3 index;
    Meeting all;
    std::vector<Meeting> warps;
    std::vector<Fiber*> fibers;
    std::vector<char> kept, dynamic;
    unsigned alive = 0;
};
struct Copy { void* to; const void* from; bool inside; };
struct Fiber {
    dim3 thread;
    unsigned rank, lane;
    Block* block;
    Meeting* warp;
    std::vector<char> stack;
    ucontext_t start;
    jmp_buf place;
    bool begun = false, done = false;
    std::vector<std::vector<Copy>> copies{1};
};

inline Fiber* self;
inline dim3 block_dim, grid_dim;
inline jmp_buf scheduler;
inline unsigned long progress;
inline std::function<void()> body;
inline std::vector<Block*> blocks;
inline unsigned grid_arrived, grid_generation, grid_size;

inline jmp_buf caller;
inline const char* failure;
[[noreturn]] inline void fail(const char* why) {
    failure = why;
    _longjmp(caller, 1);
}
inline void yield() {
    if (!_setjmp(self->place)) _longjmp(scheduler, 1);
}
inline void complete(Meeting& m) {
    if (m.act) m.act();
    m.act = nullptr;
    m.arrived = 0;
    m.generation++;
    progress++;
}
// All that meet bring `mine`; the last one acts on what all brought.
template <class F>
void meet(Meeting& m, unsigned slot, void* mine, F act) {
    const unsigned generation = m.generation;
    m.slots[slot] = mine;
    m.act = [&m, act] { act(m.slots); };
    if (++m.arrived >= m.size) complete(m);
    else while (m.generation == generation) yield();
}
template <class F>
void with_warp(void* mine, F act) { meet(*self->warp, self->lane, mine, act); }

inline void entry() {
    body();
    Fiber* f = self;
    f->done = true;
    progress++;
    for (auto* m : {f->warp, &f->block->all}) {
        m->size--;
        if (m == f->warp) m->slots[f->lane] = nullptr;
        if (m->arrived && m->arrived >= m->size) complete(*m);
    }
    f->block->alive--;
    _longjmp(scheduler, 1);
}
inline void resume(Fiber* f) {
    if (f->done) return;
    self = f;
    if (_setjmp(scheduler)) return;
    if (f->begun) _longjmp(f->place, 1);
    f->begun = true;
    f->stack.resize(256 << 10);
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack.data();
    f->start.uc_stack.ss_size = f->stack.size();
    f->start.uc_link = nullptr;
    makecontext(&f->start, entry, 0);
    setcontext(&f->start);
}
inline void swap_shared(Block* from, Block* to) {
    const size_t size = __stop_emushared - __start_emushared;
    if (from) from->kept.assign(__start_emushared, __stop_emushared);
    if (to) memcpy(__start_emushared, to->kept.data(), size);
}
inline void launch(dim3 grid, dim3 threads, size_t dynamic, std::function<void()> what) {
    blocks.clear();
    failure = nullptr;
    if (_setjmp(caller)) return;
    block_dim = threads;
    grid_dim = grid;
    body = what;
    const unsigned size = threads.x * threads.y * threads.z;
    if (size > 1024) fail("more than 1024 threads a block");
    if (dynamic > 227 * 1024) fail("more shared memory than a block may have");
    grid_size = grid.x * grid.y * grid.z;
    grid_arrived = grid_generation = 0;
    const char* seed = getenv("EMULATED_SEED");
    std::mt19937 random(seed ? atoi(seed) : 0);
    for (unsigned b = 0; b < grid_size; b++) {
        Block* block = new Block;
        block->index = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
        block->kept.assign(__stop_emushared - __start_emushared, char(0xff));
        block->dynamic.assign(dynamic + 1024, char(0xff));
        block->alive = block->all.size = size;
        block->warps.resize((size + 31) / 32);
        for (unsigned t = 0; t < size; t++) {
            Fiber* f = new Fiber;
            f->thread = {t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y)};
            f->rank = t;
            f->lane = t % 32;
            f->block = block;
            f->warp = &block->warps[t / 32];
            f->warp->size++;
            block->fibers.push_back(f);
        }
        blocks.push_back(block);
    }
    if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
    unsigned left = grid_size;
    Block* loaded = nullptr;
    for (unsigned long seen = ~0ul; left;) {
        if (progress == seen) fail("threads wait for each other for ever (a barrier that not all reach?)");
        seen = progress;
        for (Block* block : blocks) {
            if (!block->alive) continue;
            swap_shared(loaded, block);
            loaded = block;
            std::vector<unsigned> order(block->warps.size());
            for (unsigned w = 0; w < order.size(); w++) order[w] = w;
            for (unsigned long before = ~0ul; block->alive && progress != before;) {
                before = progress;
                if (seed) std::shuffle(order.begin(), order.end(), random);
                for (unsigned w : order)
                    for (unsigned l = 32 * w; l < std::min<size_t>(32 * w + 32, block->fibers.size()); l++)
                        resume(block->fibers[l]);
            }
            if (!block->alive) {
                left--;
                for (Fiber* f : block->fibers) delete f;
                block->fibers.clear();
                block->dynamic = {};
            }
        }
    }
    for (Block* block : blocks) delete block;
    blocks.clear();
}
inline void* dynamic_shared() {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(self->block->dynamic.data()) + 1023) / 1024 * 1024);
}
inline void check(const void* shared, unsigned size) {  // that it lies in this block's shared memory, aligned
    const char *at = static_cast<const char*>(shared), *dynamic = self->block->dynamic.data();
    const bool inside = (at >= __start_emushared && at + size <= __stop_emushared) ||
                        (at >= dynamic && at + size <= dynamic + self->block->dynamic.size());
    if (!inside) fail("not in shared memory");
    if (reinterpret_cast<uintptr_t>(shared) % size) fail("shared address not aligned");
}
template <class X, class F>
X shuffled(X x, F source) {  // the value of lane source(lane, 32)
    struct Slot { X in, out; } slot{x, x};
    with_warp(&slot, [source](void** slots) {
        for (int lane = 0; lane < 32; lane++) {
            if (!slots[lane]) continue;
            const int from = source(lane);
            auto* other = from >= 0 && from < 32 && slots[from] ? static_cast<Slot*>(slots[from]) : nullptr;
            static_cast<Slot*>(slots[lane])->out = other ? other->in : static_cast<Slot*>(slots[lane])->in;
        }
    });
    return slot.out;
}
template <class X, class F>
X reduced(Meeting& m, unsigned slot, X x, F join) {
    struct Slot { X in, out; } mine{x, x};
    const unsigned count = &m == self->warp ? 32 : 1024;
    meet(m, slot, &mine, [join, count](void** slots) {
        bool first = true;
        X all{};
        for (unsigned i = 0; i < count; i++)
            if (slots[i]) { all = first ? static_cast<Slot*>(slots[i])->in : join(all, static_cast<Slot*>(slots[i])->in); first = false; }
        for (unsigned i = 0; i < count; i++)
            if (slots[i]) static_cast<Slot*>(slots[i])->out = all;
        for (unsigned i = 0; i < count; i++) slots[i] = nullptr;
    });
    return mine.out;
}
template <typename T>
float number(unsigned word, int half) {
    T x;
    uint16_t bits = uint16_t(word >> 16 * half);
    memcpy(&x, &bits, 2);
    return float(x);
}

}  // namespace emulated

#define threadIdx (emulated::self->thread)
#define blockIdx (emulated::self->block->index)
#define blockDim (emulated::block_dim)
#define gridDim (emulated::grid_dim)
#define warpSize 32

inline void __syncthreads() { emulated::meet(emulated::self->block->all, emulated::self->rank, nullptr, [](void**) {}); }
inline void __syncwarp(unsigned = 0) { emulated::with_warp(nullptr, [](void**) {}); }
inline int __syncthreads_or(int p) { return emulated::reduced(emulated::self->block->all, emulated::self->rank, int(!!p), [](int a, int b) { return a | b; }); }
inline int __syncthreads_and(int p) { return emulated::reduced(emulated::self->block->all, emulated::self->rank, int(!!p), [](int a, int b) { return a & b; }); }
inline int __syncthreads_count(int p) { return emulated::reduced(emulated::self->block->all, emulated::self->rank, int(!!p), [](int a, int b) { return a + b; }); }
template <class X> X __shfl_sync(unsigned, X x, int from, int width = 32) { return emulated::shuffled(x, [=](int lane) { return lane / width * width + from % width; }); }
template <class X> X __shfl_xor_sync(unsigned, X x, int far, int = 32) { return emulated::shuffled(x, [=](int lane) { return lane ^ far; }); }
template <class X> X __shfl_down_sync(unsigned, X x, unsigned far, int width = 32) { return emulated::shuffled(x, [=](int lane) { return lane % width + int(far) < width ? lane + int(far) : -1; }); }
template <class X> X __shfl_up_sync(unsigned, X x, unsigned far, int width = 32) { return emulated::shuffled(x, [=](int lane) { return lane % width >= int(far) ? lane - int(far) : -1; }); }
inline unsigned __ballot_sync(unsigned, int p) { return emulated::reduced(*emulated::self->warp, emulated::self->lane, p ? 1u << emulated::self->lane : 0u, [](unsigned a, unsigned b) { return a | b; }); }
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, !p) == 0; }
template <class X> X __reduce_add_sync(unsigned, X x) { return emulated::reduced(*emulated::self->warp, emulated::self->lane, x, [](X a, X b) { return X(a + b); }); }
template <class X> X __reduce_max_sync(unsigned, X x) { return emulated::reduced(*emulated::self->warp, emulated::self->lane, x, [](X a, X b) { return std::max(a, b); }); }
template <class X> X __reduce_min_sync(unsigned, X x) { return emulated::reduced(*emulated::self->warp, emulated::self->lane, x, [](X a, X b) { return std::min(a, b); }); }
template <class X> X __reduce_or_sync(unsigned, X x) { return emulated::reduced(*emulated::self->warp, emulated::self->lane, x, [](X a, X b) { return X(a | b); }); }

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class X, class Y> X atomicAdd(X* p, Y y) { X old = *p; *p = X(old + X(y)); return old; }
template <class X, class Y> X atomicMax(X* p, Y y) { X old = *p; *p = std::max(old, X(y)); return old; }
template <class X, class Y> X atomicMin(X* p, Y y) { X old = *p; *p = std::min(old, X(y)); return old; }
template <class X, class Y> X atomicOr(X* p, Y y) { X old = *p; *p = old | X(y); return old; }
template <class X, class Y> X atomicAnd(X* p, Y y) { X old = *p; *p = old & X(y); return old; }
template <class X, class Y> X atomicExch(X* p, Y y) { X old = *p; *p = X(y); return old; }
template <class X> X atomicCAS(X* p, X compare, X y) { X old = *p; if (old == compare) *p = y; return old; }

using std::max;
using std::min;
inline int min(int a, unsigned b) { return std::min<long>(a, b); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned long long __float2ull_rn(float x) { return (unsigned long long)(std::nearbyint(x)); }
inline unsigned long long __float2ull_rz(float x) { return (unsigned long long)(x); }
inline unsigned __float2uint_rn(float x) { return unsigned(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return unsigned(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const uint64_t all = uint64_t(y) << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= unsigned(all >> (s >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return out;
}
template <class X> X __ldg(const X* p) { return *p; }
template <class X> X __ldcg(const X* p) { return *p; }
template <class X> X __ldcs(const X* p) { return *p; }
template <class X> void __stcg(X* p, X x) { *p = x; }
template <class X> void __stcs(X* p, X x) { *p = x; }

// Twins of units.cuh.
template <typename T>
void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Slot { float* c; const unsigned* a; unsigned b[2]; } mine{c, a, {b0, b1}};
    emulated::with_warp(&mine, [](void** slots) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; lane++) {
            auto* s = static_cast<Slot*>(slots[lane]);
            if (!s) emulated::fail("a product without all lanes");
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++)
                    A[lane / 4 + i % 2 * 8][lane % 4 * 2 + h + i / 2 * 8] = emulated::number<T>(s->a[i], h);
            for (int i = 0; i < 2; i++)
                for (int h = 0; h < 2; h++) B[lane % 4 * 2 + h + i * 8][lane / 4] = emulated::number<T>(s->b[i], h);
        }
        for (int lane = 0; lane < 32; lane++) {
            float* c = static_cast<Slot*>(slots[lane])->c;
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                float sum = 0.f;
                for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
                c[i] += sum;
            }
        }
    });
}
namespace emulated {
template <bool TRANS, int N>
void load_matrices(unsigned* r, const void* row) {
    if (int(self->lane) < 8 * N) check(row, 16);
    struct Slot { const uint16_t* row; unsigned* r; } mine{static_cast<const uint16_t*>(row), r};
    with_warp(&mine, [](void** slots) {
        for (int i = 0; i < N; i++)
            for (int lane = 0; lane < 32; lane++) {
                uint16_t two[2];
                for (int h = 0; h < 2; h++) {
                    const int line = TRANS ? lane % 4 * 2 + h : lane / 4, column = TRANS ? lane / 4 : lane % 4 * 2 + h;
                    two[h] = static_cast<Slot*>(slots[8 * i + line])->row[column];
                }
                static_cast<Slot*>(slots[lane])->r[i] = two[0] | unsigned(two[1]) << 16;
            }
    });
}
}  // namespace emulated
template <bool TRANS> void load4(unsigned (&r)[4], const void* row) { emulated::load_matrices<TRANS, 4>(r, row); }
inline unsigned turn_over(unsigned x) {
    struct Slot { unsigned in, out; } mine{x, 0};
    emulated::with_warp(&mine, [](void** slots) {
        for (int lane = 0; lane < 32; lane++) {
            unsigned out = 0;
            for (int h = 0; h < 2; h++) {
                const int line = lane % 4 * 2 + h, column = lane / 4;
                out |= (static_cast<Slot*>(slots[line * 4 + column / 2])->in >> 16 * (column % 2) & 0xffff) << 16 * h;
            }
            static_cast<Slot*>(slots[lane])->out = out;
        }
    });
    return mine.out;
}
inline float power_of_two(float x) { return std::exp2(x); }
inline void copy16_async(void* shared, const void* global, bool inside) {
    emulated::check(shared, 16);
    if (reinterpret_cast<uintptr_t>(global) % 16 && inside) emulated::fail("global address not aligned");
    emulated::self->copies.back().push_back({shared, global, inside});
}
inline void copies_commit() { emulated::self->copies.emplace_back(); }
template <int N>
void copies_wait() {
    auto& groups = emulated::self->copies;
    while (int(groups.size()) > N + 1) {
        for (auto& c : groups.front())
            if (c.inside) memcpy(c.to, c.from, 16);
            else memset(c.to, 0, 16);
        groups.erase(groups.begin());
    }
}
inline uint4 load_cg16(const void* from) { return *static_cast<const uint4*>(from); }
inline void prefetch_l2(const void*) {}
inline void grid_sync(unsigned* counter, unsigned all) {
    using namespace emulated;
    if (all != grid_size) fail("grid_sync of another number of blocks than the grid has");
    __syncthreads();
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {
        const unsigned end = *counter / all * all + all;
        ++*counter;
        progress++;
        while (int(*reinterpret_cast<volatile unsigned*>(counter) - end) < 0) yield();
    }
    __syncthreads();
}

#ifndef GROUP_PRODUCTS
#define GROUP_PRODUCTS 1
#endif
namespace emulated {
template <typename T>
float swizzled(const char* at, long offset) {
    const uintptr_t place = reinterpret_cast<uintptr_t>(at) + offset;
    T x;
    memcpy(&x, reinterpret_cast<const void*>(place ^ (place >> 3 & 0x70)), 2);
    return float(x);
}
// Four warps that are a block; `a` in shared memory or, where that is null, in registers.
template <typename T, int EIGHTS, bool TURNED>
void group_product(float (*c)[4], const void* a, const unsigned* held, const void* b, int across) {
    if (self->block->fibers.size() != 128) fail("a product of other than four warps");
    struct Slot { float (*c)[4]; const unsigned* held; const char *a, *b; } mine{
        c, held, static_cast<const char*>(a), static_cast<const char*>(b)};
    meet(self->block->all, self->rank, &mine, [across](void** slots) {
        std::vector<float> A(64 * 16), B(16 * 8 * EIGHTS);
        auto* first = static_cast<Slot*>(slots[0]);
        for (int n = 0; n < 8 * EIGHTS; n++)
            for (int k = 0; k < 16; k++)
                B[k * 8 * EIGHTS + n] = TURNED ? swizzled<T>(first->b, long(n / 64) * across + n % 64 * 2 + k * 128)
                                               : swizzled<T>(first->b, long(n) * 128 + k * 2);
        for (int t = 0; t < 128; t++) {
            auto* s = static_cast<Slot*>(slots[t]);
            if (!s || s->b != first->b || s->a != first->a) fail("threads disagree on a product");
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++) {
                    const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = t % 4 * 2 + h + i / 2 * 8;
                    A[row * 16 + k] = s->a ? swizzled<T>(s->a, long(row) * 128 + k * 2) : number<T>(s->held[i], h);
                }
        }
        for (int t = 0; t < 128; t++)
            for (int n = 0; n < EIGHTS; n++)
                for (int i = 0; i < 4; i++) {
                    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 * 8, column = 8 * n + t % 4 * 2 + i % 2;
                    float sum = 0.f;
                    for (int k = 0; k < 16; k++) sum += A[row * 16 + k] * B[k * 8 * EIGHTS + column];
                    static_cast<Slot*>(slots[t])->c[n][i] += sum;
                }
    });
}
}  // namespace emulated
template <typename T, int EIGHTS> void group_multiply(float (&c)[EIGHTS][4], const void* a, const void* b) { emulated::group_product<T, EIGHTS, false>(c, a, nullptr, b, 0); }
template <typename T, int EIGHTS> void group_multiply_turned(float (&c)[EIGHTS][4], const unsigned (&a)[4], const void* b, int across) { emulated::group_product<T, EIGHTS, true>(c, nullptr, a, b, across); }
inline void group_start() {}
inline void group_commit() {}
template <int N> void group_wait() {}
template <int EIGHTS> void group_settled(float (&)[EIGHTS][4]) {}
inline void group_sees() {}
