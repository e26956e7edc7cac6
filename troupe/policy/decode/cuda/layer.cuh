// Products of a few rows with a matrix, for a block of WARPS warps in a grid that goes through a layer together.
// A unit is eight rows of the matrix, which are eight numbers of each result. A block has its units, all warps of it
// share their sums: of each SLICE numbers a warp has its own, and the warps' sums are added up in their order. So what
// a row gives does not depend on how many others there are.
#pragma once

template <typename T, int ROWS, int UNITS, int WARPS>
struct ProductShared {
    static constexpr int SLICE = 1024;
    T x[ROWS][SLICE + 32];  // whose rows begin in different banks
    float sums[WARPS][UNITS][ROWS][8];
    float norms[ROWS];
};

// All warps' sums for number i of a row, of the j-th unit from one on.
template <typename T, int ROWS, int UNITS, int WARPS>
struct UnitSum {
    const ProductShared<T, ROWS, UNITS, WARPS>& shared;
    int unit, row, i;
    __device__ __forceinline__ float operator()(int j) const {
        float all = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) all += shared.sums[w][unit + j][row][i];
        return all;
    }
};

// rsqrt(mean square) of each row of x (rows, width).
template <typename T, int ROWS, int UNITS, int WARPS>
__device__ void row_norms(const T* x, int width, int rows, float epsilon, ProductShared<T, ROWS, UNITS, WARPS>& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < rows; row += WARPS) {
        float squares = 0.f;
        for (int i = lane; i < width / 8; i += 32) {
            const uint4 piece = load_cg16(x + size_t(row) * width + 8 * i);
            const T* number = reinterpret_cast<const T*>(&piece);
            #pragma unroll
            for (int e = 0; e < 8; e++) squares += float(number[e]) * float(number[e]);
        }
        for (int far = 16; far > 0; far /= 2) squares += __shfl_xor_sync(0xffffffff, squares, far);
        if (lane == 0) shared.norms[row] = rsqrtf(squares / width + epsilon);
    }
    __syncthreads();
}

// x (rows, width) times units of a matrix, of which `row_of(unit, i)` is the i-th row (width): `out(unit, row, i, sum)` is
// called for each result of every STEP-th unit, with its `UnitSum`. With `scale` x is
// normalized. The first weights are on their way before the grid waits for x, by `counter`, where there is one.
template <int STEP, typename T, int ROWS, int UNITS, int WARPS, class RowOf, class Out>
__device__ void multiply_units(
    const T* x, int width, int rows, const T* scale, float epsilon, int units, RowOf row_of, Out out,
    unsigned* counter, ProductShared<T, ROWS, UNITS, WARPS>& shared) {
    constexpr int SLICE = ProductShared<T, ROWS, UNITS, WARPS>::SLICE, SHARE = SLICE / WARPS, STEPS = SHARE / 32;
    constexpr int TILES = (ROWS + 15) / 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int each = (units + gridDim.x - 1) / gridDim.x;
    each = (each + STEP - 1) / STEP * STEP;
    const int begin = min(int(blockIdx.x) * each, units), end = min(begin + each, units);
    Piece weight[STEPS][UNITS];
    auto load_weights = [&](int first, int slice) {
        #pragma unroll
        for (int s = 0; s < STEPS; s++)
            #pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const int k = slice + warp * SHARE + 32 * s;
                weight[s][u] = first + u < end && k < width
                    ? reinterpret_cast<const Piece*>(row_of(first + u, g) + k)[t] : Piece{{0, 0, 0, 0}};
            }
    };
    load_weights(begin, 0);
    if (counter) grid_sync(counter, gridDim.x);
    if (scale) row_norms(x, width, rows, epsilon, shared);
    for (int first = begin; first < end; first += UNITS) {
        float sums[UNITS][TILES][4];
        #pragma unroll
        for (int i = 0; i < UNITS * TILES * 4; i++) sums[i / (TILES * 4)][i / 4 % TILES][i % 4] = 0.f;
        for (int slice = 0; slice < width; slice += SLICE) {
            const int pieces = min(SLICE, width - slice) / 8;
            if (slice || first > begin) load_weights(first, slice);
            if (first == begin || width > SLICE) {
                for (int i = threadIdx.x; i < rows * pieces; i += 32 * WARPS) {
                    const int row = i / pieces, place = i % pieces * 8;
                    const T* from = x + size_t(row) * width + slice + place;
                    if (scale) {
                        const uint4 piece = load_cg16(from);
                        const T *number = reinterpret_cast<const T*>(&piece), *by = scale + slice + place;
                        const float norm = shared.norms[row];
                        alignas(16) T scaled[8];
                        #pragma unroll
                        for (int e = 0; e < 8; e++) scaled[e] = T(float(number[e]) * norm * float(by[e]));
                        *reinterpret_cast<uint4*>(&shared.x[row][place]) = *reinterpret_cast<const uint4*>(scaled);
                    } else {
                        copy16_async(&shared.x[row][place], from, true);
                    }
                }
                copies_commit();
                copies_wait<0>();
                __syncthreads();
            }
            #pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const int k = warp * SHARE + 32 * s;
                if (slice + k >= width) break;
                #pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const Piece low = *reinterpret_cast<const Piece*>(&shared.x[16 * tile + g][k + 8 * t]);
                    const Piece high = ROWS > 8 ? *reinterpret_cast<const Piece*>(&shared.x[(16 * tile + 8 + g) % ROWS][k + 8 * t])
                                                : Piece{{0, 0, 0, 0}};
                    const unsigned a[4] = {low.x[0], high.x[0], low.x[1], high.x[1]};
                    const unsigned b[4] = {low.x[2], high.x[2], low.x[3], high.x[3]};
                    #pragma unroll
                    for (int u = 0; u < UNITS; u++) {
                        multiply<T>(sums[u][tile], a, weight[s][u].x[0], weight[s][u].x[1]);
                        multiply<T>(sums[u][tile], b, weight[s][u].x[2], weight[s][u].x[3]);
                    }
                }
            }
            if (width > SLICE) __syncthreads();  // the slice has been read
        }
        #pragma unroll
        for (int u = 0; u < UNITS; u++)
            #pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                #pragma unroll
                for (int h = 0; h < (ROWS > 8 ? 2 : 1); h++)
                    *reinterpret_cast<float2*>(&shared.sums[warp][u][16 * tile + 8 * h + g][2 * t]) =
                        make_float2(sums[u][tile][2 * h], sums[u][tile][2 * h + 1]);
        __syncthreads();
        const int here = min(UNITS, end - first) / STEP;
        for (int i = threadIdx.x; i < here * rows * 8; i += 32 * WARPS) {
            const UnitSum<T, ROWS, UNITS, WARPS> sum{shared, i / (rows * 8) * STEP, i / 8 % rows, i % 8};
            out(first + sum.unit, sum.row, sum.i, sum);
        }
        __syncthreads();
    }
}

// The matrix's rows of this block's units, brought nearer while something else is computed.
template <int STEP, int WARPS, class RowOf>
__device__ void prefetch_units(int width, int units, int size, RowOf row_of) {
    int each = (units + gridDim.x - 1) / gridDim.x;
    each = (each + STEP - 1) / STEP * STEP;
    const int begin = min(int(blockIdx.x) * each, units), end = min(begin + each, units), lines = width * size / 128;
    for (int i = threadIdx.x; i < (end - begin) * 8 * lines; i += 32 * WARPS)
        prefetch_l2(reinterpret_cast<const char*>(row_of(begin + i / (8 * lines), i / lines % 8)) + i % lines * 128);
}
