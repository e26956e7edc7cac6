// Products of rows with a matrix, for a block of WARPS warps in a grid that goes through a layer together.
// A unit is eight rows of the matrix, which are eight numbers of each result. Of more than ROWS rows the blocks take
// turns. A block has its units, and all its warps share their sums: each has every eighth step of thirty-two numbers,
// and the warps' sums are added up in their order. So what a row gives does not depend on how many others there are.
#pragma once

template <typename T, int ROWS, int WARPS>
struct ProductShared {
    static constexpr int SLICE = ROWS > 16 ? 2048 : 4096, UNITS = 4;  // UNITS: at once, at most
    T x[ROWS][SLICE + 32];  // whose rows begin in different banks
    float sums[WARPS][UNITS][ROWS][8];
    float norms[ROWS];
};

// Which rows this block has, and which of the blocks that have these it is.
struct Turn {
    int first, rows, place, blocks;
    __device__ Turn(int all, int most) {
        const int groups = (all + most - 1) / most, each = (all + groups - 1) / groups;
        first = int(blockIdx.x) % groups * each, rows = min(each, all - first);
        place = int(blockIdx.x) / groups, blocks = int(gridDim.x) / groups;
    }
    // The first of `units` that this block has, or the one behind its last: whole multiples of `step`.
    __device__ int unit(int units, int step, int behind) const {
        const int each = ((units + blocks - 1) / blocks + step - 1) / step * step;
        return min((place + behind) * each, units);
    }
};

// All warps' sums for number i of a row, of the j-th unit from one on.
template <typename T, int ROWS, int WARPS>
struct UnitSum {
    const ProductShared<T, ROWS, WARPS>& shared;
    int unit, row, i;
    __device__ __forceinline__ float operator()(int j) const {
        float all = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) all += shared.sums[w][unit + j][row][i];
        return all;
    }
};

// Numbers [slice, slice + SLICE) of the turn's rows of x (rows, width) into shared memory; with `scale` normalized.
template <typename T, int ROWS, int WARPS>
__device__ void load_rows(
    const T* x, int width, int slice, const Turn& turn, const T* scale, float epsilon, ProductShared<T, ROWS, WARPS>& shared) {
    constexpr int HELD = 4;  // pieces of a row that a lane keeps
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int pieces = min(ProductShared<T, ROWS, WARPS>::SLICE, width - slice) / 8;
    auto normalize = [&](const uint4& piece, float norm, int row, int i) {
        const T *number = reinterpret_cast<const T*>(&piece), *by = scale + slice + 8 * i;
        alignas(16) T scaled[8];
        #pragma unroll
        for (int e = 0; e < 8; e++) scaled[e] = T(float(number[e]) * norm * float(by[e]));
        *reinterpret_cast<uint4*>(&shared.x[row][8 * i]) = *reinterpret_cast<const uint4*>(scaled);
    };
    auto square = [](const uint4& piece) {
        const T* number = reinterpret_cast<const T*>(&piece);
        float sum = 0.f;
        #pragma unroll
        for (int e = 0; e < 8; e++) sum += float(number[e]) * float(number[e]);
        return sum;
    };
    if (!scale) {
        for (int i = threadIdx.x; i < turn.rows * pieces; i += 32 * WARPS) {
            const int row = i / pieces, place = i % pieces * 8;
            copy16_async(&shared.x[row][place], x + size_t(turn.first + row) * width + slice + place, true);
        }
        copies_commit();
        copies_wait<0>();
        return;
    }
    for (int row = warp; row < turn.rows; row += WARPS) {
        const T* from = x + size_t(turn.first + row) * width;
        uint4 held[HELD];
        #pragma unroll
        for (int n = 0; n < HELD; n++) held[n] = lane + 32 * n < width / 8 ? load_cg16(from + 8 * (lane + 32 * n)) : uint4{0, 0, 0, 0};
        float norm = shared.norms[row];
        if (slice == 0) {
            float squares = 0.f;
            #pragma unroll
            for (int n = 0; n < HELD; n++) squares += square(held[n]);
            for (int i = lane + 32 * HELD; i < width / 8; i += 32) squares += square(load_cg16(from + 8 * i));
            for (int far = 16; far > 0; far /= 2) squares += __shfl_xor_sync(0xffffffff, squares, far);
            norm = rsqrtf(squares / width + epsilon);
            __syncwarp();
            if (lane == 0) shared.norms[row] = norm;
            #pragma unroll
            for (int n = 0; n < HELD; n++)
                if (lane + 32 * n < pieces) normalize(held[n], norm, row, lane + 32 * n);
        }
        for (int i = slice ? lane : lane + 32 * HELD; i < pieces; i += 32) normalize(load_cg16(from + slice + 8 * i), norm, row, i);
    }
}

// x (rows, width) times units of a matrix, of which `row_of(unit, i)` is the i-th row (width): `out(unit, row, i, sum)` is
// called for each result of every STEP-th unit, with its `UnitSum`. With `scale` x is normalized. UNITS are multiplied at
// once. Of the first of them, AHEAD · 1,024 numbers of each row are on their way before the grid waits for x, by
// `counter`, where there is one.
template <int STEP, int UNITS, int AHEAD, typename T, int ROWS, int WARPS, class RowOf, class Out>
__device__ void multiply_units(
    const T* x, int width, const Turn& turn, const T* scale, float epsilon, int units, RowOf row_of, Out out,
    unsigned* counter, ProductShared<T, ROWS, WARPS>& shared) {
    constexpr int SLICE = ProductShared<T, ROWS, WARPS>::SLICE, STEPS = 1024 / (32 * WARPS), TILES = (ROWS + 15) / 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int begin = turn.unit(units, STEP, 0), end = turn.unit(units, STEP, 1);
    Piece weight[AHEAD * STEPS][UNITS];
    auto load_weights = [&](int first, int pass) {
        #pragma unroll
        for (int s = 0; s < AHEAD * STEPS; s++)
            #pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const int k = pass + 32 * (warp + WARPS * s);
                weight[s][u] = first + u < end && k < width
                    ? reinterpret_cast<const Piece*>(row_of(first + u, g) + k)[t] : Piece{{0, 0, 0, 0}};
            }
    };
    load_weights(begin, 0);
    if (counter) grid_sync(counter, gridDim.x);
    for (int first = begin; first < end; first += UNITS) {
        float sums[UNITS][TILES][4];
        #pragma unroll
        for (int i = 0; i < UNITS * TILES * 4; i++) sums[i / (TILES * 4)][i / 4 % TILES][i % 4] = 0.f;
        for (int pass = 0; pass < width; pass += AHEAD * 1024) {
            if (pass) load_weights(first, pass);
            #pragma unroll
            for (int part = 0; part < AHEAD; part++) {
                const int base = pass + 1024 * part, slice = base / SLICE * SLICE;
                if (base >= width) break;
                if (base == slice && (first == begin || width > SLICE)) {
                    __syncthreads();  // what was there has been read
                    load_rows(x, width, slice, turn, scale, epsilon, shared);
                    __syncthreads();
                }
                #pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    const int k = base + 32 * (warp + WARPS * s);
                    if (k >= width) break;
                    #pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        const T* at = &shared.x[16 * tile + g][k - slice + 8 * t];
                        const Piece low = *reinterpret_cast<const Piece*>(at);
                        const Piece high = ROWS > 8 ? *reinterpret_cast<const Piece*>(at + 8 * (SLICE + 32)) : Piece{{0, 0, 0, 0}};
                        const unsigned a[4] = {low.x[0], high.x[0], low.x[1], high.x[1]};
                        const unsigned b[4] = {low.x[2], high.x[2], low.x[3], high.x[3]};
                        #pragma unroll
                        for (int u = 0; u < UNITS; u++) {
                            const Piece& by = weight[part * STEPS + s][u];
                            multiply<T>(sums[u][tile], a, by.x[0], by.x[1]);
                            multiply<T>(sums[u][tile], b, by.x[2], by.x[3]);
                        }
                    }
                }
            }
        }
        if (first + UNITS < end) load_weights(first + UNITS, 0);
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
        for (int i = threadIdx.x; i < here * turn.rows * 8; i += 32 * WARPS) {
            const UnitSum<T, ROWS, WARPS> sum{shared, i / (turn.rows * 8) * STEP, i / 8 % turn.rows, i % 8};
            out(first + sum.unit, turn.first + sum.row, sum.i, sum);
        }
        __syncthreads();
    }
}

// So many lines of 128 bytes from an address on are brought nearer.
__device__ __forceinline__ void prefetch_lines(const void* from, int lines) {
    for (int i = threadIdx.x; i < lines; i += blockDim.x) prefetch_l2(static_cast<const char*>(from) + size_t(i) * 128);
}

// The matrix's rows of this block's units, while something else is computed; they lie behind each other.
template <int STEP, class RowOf>
__device__ void prefetch_units(int width, int size, int units, const Turn& turn, RowOf row_of) {
    const int begin = turn.unit(units, STEP, 0), end = turn.unit(units, STEP, 1);
    for (int unit = begin; unit < end; unit++) prefetch_lines(row_of(unit, 0), 8 * width * size / 128);
}
