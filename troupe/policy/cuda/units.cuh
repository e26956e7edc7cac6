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

// Four (or two) 8 × 8 matrices of 16-bit numbers from shared memory; lanes 8·i … 8·i + 7 name the rows of matrix i.
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

template <bool TRANS>
__device__ __forceinline__ void load2(unsigned (&r)[2], const void* row) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}

// An 8 × 8 matrix of 16-bit numbers turned over.
__device__ __forceinline__ unsigned turn_over(unsigned x) {
    unsigned over;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(over) : "r"(x));
    return over;
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
