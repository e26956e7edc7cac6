// What kernels ask of an NVIDIA card (Ampere or later) beyond plain CUDA, a function each. For tests without a card,
// tests/support/emulated_cuda.h has a twin of every function here. Numbers of fragments as in PTX's documents: a lane
// holds of a 16 × 16 operand rows lane / 4 and lane / 4 + 8, columns 2·(lane % 4) and 8 beyond.
#pragma once
#include <cuda/std/type_traits>

// c += a·b: a (16 × 16, by rows), b (16 × 8, by columns) of 16-bit numbers, c (16 × 8) float32.
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (cuda::std::is_same_v<T, __nv_bfloat16>)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 × 8 matrices of 16-bit numbers from shared memory; lanes 8·i … 8·i + 7 name the rows of matrix i.
template <bool TRANS>
__device__ __forceinline__ void load4(unsigned (&r)[4], const void* row) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// An 8 × 8 matrix of 16-bit numbers turned over.
__device__ __forceinline__ unsigned turn_over(unsigned x) {
    unsigned over;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(over) : "r"(x));
    return over;
}

// 2^x to about 2 units in the last place, in one instruction; what is too small for a normal number is zero.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Sixteen bytes from global to shared memory while the thread goes on; zeros where `inside` is false.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool inside) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of the thread's groups of copies are under way.
template <int N>
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Sixteen bytes that another block may have written in this launch: not from the multiprocessor's own cache.
__device__ __forceinline__ uint4 load_cg16(const void* from) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}

// The 128 bytes around an address are brought nearer, to the cache that all multiprocessors share.
__device__ __forceinline__ void prefetch_l2(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// All `blocks` of a grid, which must be resident together, wait for each other; what they wrote before is then seen by
// all. `counter` is zero at first and counts up by `blocks` each time.
__device__ __forceinline__ void grid_sync(unsigned* counter, unsigned blocks) {
    __syncthreads();
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {
        __threadfence();
        const unsigned before = atomicAdd(counter, 1u), all = before / blocks * blocks + blocks;
        unsigned now;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
        } while (int(now - all) < 0);
        __threadfence();
    }
    __syncthreads();
}

// Products of four warps together, as Hopper has them: c (64 × COLUMNS) += a·b. Fragments of c and of a left matrix in
// registers are those of `multiply`, sixteen rows a warp. A matrix in shared memory is named by its first number; it has
// lines of 128 bytes, whose pieces of 16 are permuted by the line (piece ^ line % 8), groups of eight lines after each
// other, from a multiple of 1024 on. Of `a`, and of `b` unless TURNED, a line is a row of 64 numbers of which sixteen
// are multiplied; of a TURNED `b` sixteen lines, and the next 64 columns are `across` bytes away.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define GROUP_PRODUCTS 1
__device__ __forceinline__ unsigned long long group_matrix(const void* at, int across) {
    const unsigned long long from = static_cast<unsigned>(__cvta_generic_to_shared(at));
    return (from & 0x3ffff) >> 4 | static_cast<unsigned long long>(across >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
#define C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define C32(n) C4(n), C4(n + 1), C4(n + 2), C4(n + 3), C4(n + 4), C4(n + 5), C4(n + 6), C4(n + 7)
#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
            "%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
            "%56,%57,%58,%59,%60,%61,%62,%63"
#define GROUP64(type) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" R32 "}, %32, %33, 1, 1, 1, 0, 0;" \
                 : C32(0) : "l"(group_matrix(a, 16)), "l"(group_matrix(b, 16)))
#define GROUP64_HELD(type) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
                 " {" R32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;" \
                 : C32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(group_matrix(b, across)))
#define GROUP128_HELD(type) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
                 " {" R64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;" \
                 : C32(0), C32(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(group_matrix(b, across)))
// Both matrices in shared memory, 64 columns; other numbers of columns, here and below, are not there.
template <typename T, int EIGHTS>
__device__ __forceinline__ void group_multiply(float (&c)[EIGHTS][4], const void* a, const void* b) {
    if constexpr (EIGHTS == 8) {
        if constexpr (cuda::std::is_same_v<T, __nv_bfloat16>) GROUP64("bf16");
        else GROUP64("f16");
    }
}
// The left one in registers, the right one TURNED.
template <typename T, int EIGHTS>
__device__ __forceinline__ void group_multiply_turned(
    float (&c)[EIGHTS][4], const unsigned (&a)[4], const void* b, int across) {
    if constexpr (EIGHTS == 8) {
        if constexpr (cuda::std::is_same_v<T, __nv_bfloat16>) GROUP64_HELD("bf16");
        else GROUP64_HELD("f16");
    } else if constexpr (EIGHTS == 16) {
        if constexpr (cuda::std::is_same_v<T, __nv_bfloat16>) GROUP128_HELD("bf16");
        else GROUP128_HELD("f16");
    }
}
__device__ __forceinline__ void group_start() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the groups of products are under way; before it, nobody may touch what they add to.
template <int N>
__device__ __forceinline__ void group_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Of what is added to: the compiler may read it no earlier than here, behind such a wait, and write it no later, before
// `group_start`.
template <int EIGHTS>
__device__ __forceinline__ void group_settled(float (&c)[EIGHTS][4]) {
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) asm volatile("" : C4(n)::"memory");
}
// What a thread wrote to shared memory, copies too, is seen by products of groups behind the next barrier.
__device__ __forceinline__ void group_sees() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
#define GROUP_PRODUCTS 0
template <typename T, int EIGHTS>
__device__ void group_multiply(float (&)[EIGHTS][4], const void*, const void*) {}
template <typename T, int EIGHTS>
__device__ void group_multiply_turned(float (&)[EIGHTS][4], const unsigned (&)[4], const void*, int) {}
__device__ inline void group_start() {}
__device__ inline void group_commit() {}
template <int N>
__device__ void group_wait() {}
template <int EIGHTS>
__device__ void group_settled(float (&)[EIGHTS][4]) {}
__device__ inline void group_sees() {}
#endif
