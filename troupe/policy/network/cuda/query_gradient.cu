// The cotangent of ROWS queries of one head; and for `key_gradient.cu`, of each query, log2 Σ 2^score beside
// Σ cotangent · result. FlashAttention-2's formulas (arXiv:2307.08691).
const int H = q_shape[1], K = k_shape[1];
const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, h = blockIdx.y, kv = h / (H / K);
const float factor = scale[0] * LOG2_E;
T* const own = reinterpret_cast<T*>(memory);
auto tile = [&](int item) { return own + 2 * ROWS * SIZE + item % 2 * 2 * KEYS * SIZE; };
const T *const from_k = k + kv * SIZE, *const from_v = v + kv * SIZE;
const int begin = max(0, first - window + 1) / KEYS;
const int count = first < stop && first + ROWS > begins ? (min(stop, first + ROWS) + KEYS - 1) / KEYS - begin : 0;
auto start = [&](int item) {
    fetch(tile(item), KEYS, from_k, K * SIZE, (begin + item) * KEYS);
    fetch(tile(item) + KEYS * SIZE, KEYS, from_v, K * SIZE, (begin + item) * KEYS);
};

static_assert(ROWS <= 2 * KEYS);
fetch(own, ROWS, q + h * SIZE, H * SIZE, first);
fetch(own + ROWS * SIZE, ROWS, o_grad + h * SIZE, H * SIZE, first);
fetch(tile(1), ROWS, o + h * SIZE, H * SIZE, first);
if (count > 0) start(0);
copies_commit();
copies_wait<0>();
if constexpr (GROUPED) group_sees();
__syncthreads();
unsigned queries[HELD ? STEPS : 1][4], grads[HELD ? STEPS : 1][4];
float means[2] = {0.f, 0.f};
#pragma unroll
for (int step = 0; step < STEPS; step++) {
    unsigned results[4];
    const int at_step = HELD ? step : 0;
    if constexpr (HELD) left(queries[step], own, ROWS, 16 * warp, step);
    left(grads[at_step], own + ROWS * SIZE, ROWS, 16 * warp, step);
    left(results, tile(1), ROWS, 16 * warp, step);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const T *x = reinterpret_cast<const T*>(&grads[at_step][i]), *y = reinterpret_cast<const T*>(&results[i]);
        means[i % 2] += float(x[0]) * float(y[0]) + float(x[1]) * float(y[1]);
    }
}
float totals[2];
const int lowest = first + 16 * warp;
#pragma unroll
for (int i = 0; i < 2; i++) {
    means[i] += __shfl_xor_sync(0xffffffff, means[i], 1);
    means[i] += __shfl_xor_sync(0xffffffff, means[i], 2);
    const int query = lowest + line + 8 * i;
    const int64_t number = (int64_t(b) * H + h) * padded + query;
    totals[i] = query >= begins && query < stop ? normalizers[number] : INFINITE;
    if (pair == 0 && query < padded) *reinterpret_cast<float2*>(pairs + 2 * number) = make_float2(totals[i], means[i]);
}

float sums[PIECES][4];
#pragma unroll
for (int n = 0; n < PIECES; n++)
    for (int i = 0; i < 4; i++) sums[n][i] = 0.f;
for (int item = 0; item < count; item++) {
    copies_wait<0>();
    if constexpr (GROUPED) group_sees();
    __syncthreads();
    auto ask = [&] {
        if (item + 1 < count) start(item + 1);
        copies_commit();
    };
    const int key = (begin + item) * KEYS;
    const int low = GROUPED ? first : lowest;
    const bool is_hidden = key > low + reach || key + KEYS - 1 <= low - window;
    if (!GROUPED || is_hidden) ask();
    if (is_hidden) continue;
    T* const keys = tile(item);
    T* const values = keys + KEYS * SIZE;
    float scores[KEYS / 8][4], shares[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        for (int i = 0; i < 4; i++) scores[n][i] = shares[n][i] = 0.f;
    if constexpr (GROUPED) {
        group_settled(scores);
        group_settled(shares);
        group_start();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            group_multiply<T>(scores, numbers_from(own, ROWS, step), numbers_from(keys, KEYS, step));
        group_commit();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            group_multiply<T>(shares, numbers_from(own + ROWS * SIZE, ROWS, step), numbers_from(values, KEYS, step));
        group_commit();
        ask();  // while products are under way
        group_wait<1>();
        group_settled(scores);
    } else {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int at_step = HELD ? step : 0;
            if constexpr (!HELD) {
                left(queries[0], own, ROWS, 16 * warp, step);
                left(grads[0], own + ROWS * SIZE, ROWS, 16 * warp, step);
            }
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                unsigned of_keys[4], of_values[4];
                right_by_rows(of_keys, keys, KEYS, 16 * n, step);
                right_by_rows(of_values, values, KEYS, 16 * n, step);
                multiply<T>(scores[2 * n], queries[at_step], of_keys[0], of_keys[1]);
                multiply<T>(scores[2 * n + 1], queries[at_step], of_keys[2], of_keys[3]);
                multiply<T>(shares[2 * n], grads[at_step], of_values[0], of_values[1]);
                multiply<T>(shares[2 * n + 1], grads[at_step], of_values[2], of_values[3]);
            }
        }
    }
    if (key + KEYS - 1 > lowest || key <= lowest + 15 - window)
        hide(scores, KEYS, lowest - key, 1, -1, window, factor < 0.f ? INFINITE : -INFINITE);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[n][i] = power_of_two(scores[n][i] * factor - totals[i / 2]);
    if constexpr (GROUPED) {
        group_wait<0>();
        group_settled(shares);
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[n][i] *= shares[n][i] - means[i / 2];
    if constexpr (GROUPED) {
        unsigned of_scores[KEYS / 16][4];
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) as_left(of_scores[step], scores, step);
        group_start();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++)
            group_multiply_turned<T>(sums, of_scores[step], keys + 16 * step * 64, KEYS * 128);
        group_commit();
        group_wait<0>();
        group_settled(sums);
    } else {
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            unsigned of_scores[4];
            as_left(of_scores, scores, step);
#pragma unroll
            for (int n = 0; n < STEPS; n++) {
                unsigned of_keys[4];
                right(of_keys, keys, KEYS, 16 * step, n);
                multiply<T>(sums[2 * n], of_scores, of_keys[0], of_keys[1]);
                multiply<T>(sums[2 * n + 1], of_scores, of_keys[2], of_keys[3]);
            }
        }
    }
}
if constexpr (GROUPED) __syncthreads();  // its last product may read rows of others
write(own, sums, scale[0], scale[0], q_grad + h * SIZE, H * SIZE, first, true);
