// The cotangents of ROWS keys and values of one head, over all queries that see them: head after head, tile after tile.
// FlashAttention-2's formulas (arXiv:2307.08691). Keys are the rows of all products, so that the weights stay where the
// matrix units left them. OF_KEYS, OF_VALUES: which of the two; heads of 256 have room for one.
const int H = q_shape[1], K = k_shape[1], R = H / K;
const int first = blockIdx.x * ROWS, kv = blockIdx.y;
const float factor = scale[0] * LOG2_E;
constexpr int TILE = 2 * QUERIES * SIZE;
T* const keys = reinterpret_cast<T*>(memory);
T* const values = keys + ROWS * SIZE;
auto tile = [&](int item) { return values + ROWS * SIZE + item % 2 * TILE; };
float* const known_of = reinterpret_cast<float*>(values + ROWS * SIZE + 2 * TILE);  // two tiles of pairs
const int begin = max(first, begins) / QUERIES, end = (min(stop, first + ROWS - 1 + window) + QUERIES - 1) / QUERIES;
const int count = first < stop ? max(0, end - begin) : 0, items = R * count;
auto start = [&](int item) {
    const int h = kv * R + item / count, query = (begin + item % count) * QUERIES;
    T* const queries = tile(item);
    fetch(queries, QUERIES, q + h * SIZE, H * SIZE, query);
    fetch(queries + QUERIES * SIZE, QUERIES, o_grad + h * SIZE, H * SIZE, query);
    const float* const from = pairs + ((int64_t(b) * H + h) * padded + query) * 2;
    if (threadIdx.x < QUERIES / 2)
        copy16_async(known_of + item % 2 * 2 * QUERIES + 4 * threadIdx.x, from + 4 * threadIdx.x, true);
};

const int64_t place = (int64_t(b) * S * K + kv) * SIZE;  // of what is written, which has a row's places
fetch(keys, ROWS, k + kv * SIZE, K * SIZE, first);
if constexpr (OF_KEYS) fetch(values, ROWS, v + kv * SIZE, K * SIZE, first);
if (items > 0) start(0);
copies_commit();

float key_sums[PIECES][4], value_sums[PIECES][4];
#pragma unroll
for (int n = 0; n < PIECES; n++)
    for (int i = 0; i < 4; i++) key_sums[n][i] = value_sums[n][i] = 0.f;
const int lowest = first + 16 * warp;
for (int item = 0; item < items; item++) {
    copies_wait<0>();
    if constexpr (GROUPED) group_sees();
    __syncthreads();
    bool is_asked = false;
    auto ask = [&] {
        if (!is_asked && item + 1 < items) start(item + 1);
        if (!is_asked) copies_commit();
        is_asked = true;
    };
    if (!GROUPED) ask();
    T* const queries = tile(item);
    T* const grads = queries + QUERIES * SIZE;
    const float* const of_queries = known_of + item % 2 * 2 * QUERIES;
#pragma unroll 1
    for (int part = 0; part < QUERIES; part += PART) {
        const int query = (begin + item % count) * QUERIES + part;
        const int low = GROUPED ? first : lowest;
        if (query + PART - 1 < low || query >= low + reach + window) continue;
        float scores[PART / 8][4], shares[PART / 8][4];
#pragma unroll
        for (int n = 0; n < PART / 8; n++)
            for (int i = 0; i < 4; i++) scores[n][i] = shares[n][i] = 0.f;
        if constexpr (GROUPED) {
            group_settled(scores);
            group_settled(shares);
            group_start();
#pragma unroll
            for (int step = 0; step < STEPS; step++)
                group_multiply<T>(scores, numbers_from(keys, ROWS, step), numbers_from(queries, QUERIES, step));
            group_commit();
#pragma unroll
            for (int step = 0; step < STEPS; step++)
                group_multiply<T>(shares, numbers_from(values, ROWS, step), numbers_from(grads, QUERIES, step));
            group_commit();
            ask();  // while products are under way
            group_wait<1>();
            group_settled(scores);
        } else {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                unsigned of_keys[4], of_values[4];
                left(of_keys, keys, ROWS, 16 * warp, step);
                if constexpr (OF_KEYS) left(of_values, values, ROWS, 16 * warp, step);
#pragma unroll
                for (int n = 0; n < PART / 16; n++) {
                    unsigned x[4], y[4];
                    right_by_rows(x, queries, QUERIES, part + 16 * n, step);
                    multiply<T>(scores[2 * n], of_keys, x[0], x[1]);
                    multiply<T>(scores[2 * n + 1], of_keys, x[2], x[3]);
                    if constexpr (OF_KEYS) {
                        right_by_rows(y, grads, QUERIES, part + 16 * n, step);
                        multiply<T>(shares[2 * n], of_values, y[0], y[1]);
                        multiply<T>(shares[2 * n + 1], of_values, y[2], y[3]);
                    }
                }
            }
        }
        if (query < lowest + 15 || query + PART - 1 - lowest >= window)
            hide(scores, PART, query - lowest, -1, 1, window, factor < 0.f ? INFINITE : -INFINITE);
#pragma unroll
        for (int n = 0; n < PART / 8; n++) {
            const float4 known = *reinterpret_cast<const float4*>(of_queries + 2 * (part + 8 * n + pair));
#pragma unroll
            for (int i = 0; i < 4; i++)
                scores[n][i] = power_of_two(scores[n][i] * factor - (i % 2 ? known.z : known.x));
        }
        if constexpr (GROUPED) {
            group_wait<0>();
            group_settled(shares);
        }
#pragma unroll
        for (int n = 0; n < PART / 8; n++) {
            const float4 known = *reinterpret_cast<const float4*>(of_queries + 2 * (part + 8 * n + pair));
#pragma unroll
            for (int i = 0; i < 4; i++) shares[n][i] = scores[n][i] * (shares[n][i] - (i % 2 ? known.w : known.y));
        }
        if constexpr (GROUPED) {
            unsigned weights[PART / 16][4], of_scores[PART / 16][4];
#pragma unroll
            for (int step = 0; step < PART / 16; step++) {
                as_left(weights[step], scores, step);
                as_left(of_scores[step], shares, step);
            }
            group_start();
#pragma unroll
            for (int step = 0; step < PART / 16; step++) {
                group_multiply_turned<T>(value_sums, weights[step], grads + 16 * step * 64, QUERIES * 128);
                group_multiply_turned<T>(key_sums, of_scores[step], queries + 16 * step * 64, QUERIES * 128);
            }
            group_commit();
            group_wait<0>();
            group_settled(value_sums);
            group_settled(key_sums);
        } else {
#pragma unroll
            for (int step = 0; step < PART / 16; step++) {
                unsigned weights[4], of_scores[4];
                if constexpr (OF_VALUES) as_left(weights, scores, step);
                if constexpr (OF_KEYS) as_left(of_scores, shares, step);
#pragma unroll
                for (int n = 0; n < STEPS; n++) {
                    unsigned x[4], y[4];
                    if constexpr (OF_VALUES) {
                        right(x, grads, QUERIES, part + 16 * step, n);
                        multiply<T>(value_sums[2 * n], weights, x[0], x[1]);
                        multiply<T>(value_sums[2 * n + 1], weights, x[2], x[3]);
                    }
                    if constexpr (OF_KEYS) {
                        right(y, queries, QUERIES, part + 16 * step, n);
                        multiply<T>(key_sums[2 * n], of_scores, y[0], y[1]);
                        multiply<T>(key_sums[2 * n + 1], of_scores, y[2], y[3]);
                    }
                }
            }
        }
    }
    ask();
}
copies_wait<0>();
__syncthreads();
if constexpr (OF_KEYS) write(keys, key_sums, scale[0], scale[0], k_grad + place, K * SIZE, first, false);
if constexpr (OF_VALUES) write(values, value_sums, 1.f, 1.f, v_grad + place, K * SIZE, first, false);
