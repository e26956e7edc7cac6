// What the kernels of attention over whole rows share: it stands before each of them.
//
// A block is WARPS warps, each with sixteen rows of a matrix of its own; the other matrix comes tile by tile, two at a
// time: while one is multiplied the next is on its way. A tile has rows of SIZE numbers, 64 of all rows before the next
// 64. Their pieces of 16 bytes are permuted by the row, or the eight rows that the card reads at once would lie in the
// same banks.
constexpr int THREADS = 32 * WARPS, ROWS = 16 * WARPS, PIECES = SIZE / 8, STEPS = SIZE / 16;
constexpr bool GROUPED = GROUP_PRODUCTS && SIZE <= 128 && WARPS == 4;  // whether four warps multiply together
constexpr bool HELD = SIZE <= 128 && !GROUPED;  // whether a warp keeps its own rows in registers
constexpr float LOG2_E = 1.4426950408889634f;
const float INFINITE = __int_as_float(0x7f800000);
extern __shared__ __align__(1024) char memory[];
const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
const int line = lane / 4, pair = lane % 4 * 2;  // what a lane has of a product: rows line, line + 8, columns pair, + 1

auto at = [](T* tile, int rows, int row, int piece) {
    return tile + (piece >> 3) * rows * 64 + row * 64 + (((piece & 7) ^ (row & 7)) << 3);
};

// Of the row: places from `begins` to before `stop` are asked about, `stop` keys are there. Which token stands where:
// those of the prompt, which other rows may share, then its own.
const int b = blockIdx.z, begins = spans[5 * b], stop = spans[5 * b + 1], prompt = spans[5 * b + 2];
const int of_prompt = spans[5 * b + 3], of_own = spans[5 * b + 4];
const int window = limits[0], S = limits[1], padded = (S + 63) / 64 * 64;
auto token = [&](int place) { return int64_t(place + (place < prompt ? of_prompt : of_own)); };

// Places first … of one head, of (N, heads, SIZE) in global memory, into a tile; zeros from place `stop` on.
auto fetch = [&](T* tile, int rows, const T* from, int stride, int first) {
#pragma unroll
    for (int i = 0; i < rows * PIECES / THREADS; i++) {
        const int place = i * THREADS + threadIdx.x, row = place / PIECES, piece = place % PIECES;
        const bool inside = first + row < stop;
        copy16_async(at(tile, rows, row, piece), from + (inside ? token(first + row) * stride : 0) + piece * 8, inside);
    }
};

// Operands from a tile: sixteen rows × numbers 16·step …; as the left matrix, as the right one of which rows are columns
// (two products), and as the right one itself, of which 16·step … are the columns (two products).
auto left = [&](unsigned (&a)[4], T* tile, int rows, int row, int step) {
    load4<false>(a, at(tile, rows, row + lane % 16, 2 * step + lane / 16));
};
auto right_by_rows = [&](unsigned (&b)[4], T* tile, int rows, int row, int step) {
    load4<false>(b, at(tile, rows, row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
};
auto right = [&](unsigned (&b)[4], T* tile, int rows, int row, int step) {
    load4<true>(b, at(tile, rows, row + lane % 16, 2 * step + lane / 16));
};

// Where a group's product begins in a tile: numbers 16·step … of its rows.
auto numbers_from = [](T* tile, int rows, int step) { return tile + step / 4 * rows * 64 + step % 4 * 16; };

auto packed = [](float x, float y) {
    if constexpr (cuda::std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
        return *reinterpret_cast<const unsigned*>(&two);
    } else {
        const __half2 two = __floats2half2_rn(x, y);
        return *reinterpret_cast<const unsigned*>(&two);
    }
};
// Columns 16·step … of a product as the left matrix of the next.
auto as_left = [&](unsigned (&a)[4], const float (*product)[4], int step) {
    a[0] = packed(product[2 * step][0], product[2 * step][1]);
    a[1] = packed(product[2 * step][2], product[2 * step][3]);
    a[2] = packed(product[2 * step + 1][0], product[2 * step + 1][1]);
    a[3] = packed(product[2 * step + 1][2], product[2 * step + 1][3]);
};

// Of a tile of scores, what a query may not see: `back`, of its first number, is how far the key lies behind the query,
// which changes by `by_row` and `by_column`.
auto hide = [&](float (*scores)[4], int columns, int back, int by_row, int by_column, int window, float hidden) {
#pragma unroll
    for (int n = 0; n < columns / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int here = back + by_row * (line + i / 2 * 8) + by_column * (8 * n + pair + i % 2);
            if (here < 0 || here >= window) scores[n][i] = hidden;
        }
};

// A warp's sixteen rows of sums, times two numbers, to places first + 16·warp … of (places, heads, SIZE) or, where they
// are `packed_too`, of the tokens that are asked about; by way of the same rows of a tile that no other warp reads.
auto write = [&](T* tile, const float (*sums)[4], float factor, float factor_below, T* to, int stride, int first,
                 bool packed_too) {
    const int own = 16 * warp;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < PIECES; n++) {
        *reinterpret_cast<unsigned*>(at(tile, ROWS, own + line, n) + pair) = packed(sums[n][0] * factor, sums[n][1] * factor);
        *reinterpret_cast<unsigned*>(at(tile, ROWS, own + line + 8, n) + pair) =
            packed(sums[n][2] * factor_below, sums[n][3] * factor_below);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * PIECES / 32; i++) {
        const int row = own + (32 * i + lane) / PIECES, piece = (32 * i + lane) % PIECES;
        if (first + row < stop && (!packed_too || first + row >= begins))
            *reinterpret_cast<uint4*>(to + (packed_too ? token(first + row) : first + row) * stride + piece * 8) =
                *reinterpret_cast<const uint4*>(at(tile, ROWS, row, piece));
    }
};

// What a warp skips by, and hides by: the rows that it multiplies, its own or a group's.
const int reach = GROUPED ? 63 : 15;
