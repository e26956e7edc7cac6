// Attention of ROWS queries of one head, which see themselves and what is before them, at most `window`: the result and
// log2 Σ 2^score of each, inf where there is no query. Online softmax (arXiv:1805.02867).
const int H = q_shape[1], K = k_shape[1];
const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, h = blockIdx.y, kv = h / (H / K);
const float factor = scale[0] * LOG2_E;
T* const own = reinterpret_cast<T*>(memory);
auto tile = [&](int item) { return own + ROWS * SIZE + item % 2 * KEYS * SIZE; };
T* const values = own + ROWS * SIZE + 2 * KEYS * SIZE;  // one tile, so that more blocks have room
const T *const from_k = k + kv * SIZE, *const from_v = v + kv * SIZE;
const int begin = max(0, first - window + 1) / KEYS;
const int count = first < stop && first + ROWS > begins ? (min(stop, first + ROWS) + KEYS - 1) / KEYS - begin : 0;
auto start = [&](int item) { fetch(tile(item), KEYS, from_k, K * SIZE, (begin + item) * KEYS); };

fetch(own, ROWS, q + h * SIZE, H * SIZE, first);
if (count > 0) start(0);
copies_commit();
copies_wait<0>();
if constexpr (GROUPED) group_sees();
__syncthreads();
unsigned queries[HELD ? STEPS : 1][4];
#pragma unroll
for (int step = 0; HELD && step < STEPS; step++) left(queries[step], own, ROWS, 16 * warp, step);

float sums[PIECES][4], peak[2] = {-INFINITE, -INFINITE}, total[2] = {0.f, 0.f};
#pragma unroll
for (int n = 0; n < PIECES; n++)
    for (int i = 0; i < 4; i++) sums[n][i] = 0.f;
const int lowest = first + 16 * warp;
for (int item = 0; item < count; item++) {
    copies_wait<0>();
    if constexpr (GROUPED) group_sees();
    __syncthreads();
    auto ask = [&] {
        fetch(values, KEYS, from_v, K * SIZE, (begin + item) * KEYS);
        copies_commit();
        if (item + 1 < count) start(item + 1);
        copies_commit();
    };
    const int key = (begin + item) * KEYS;
    if (!GROUPED) ask();
    T* const keys = tile(item);
    float scores[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        for (int i = 0; i < 4; i++) scores[n][i] = 0.f;
    if constexpr (GROUPED) {
        group_settled(scores);
        group_start();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            group_multiply<T>(scores, numbers_from(own, ROWS, step), numbers_from(keys, KEYS, step));
        group_commit();
        ask();  // while products are under way
        group_wait<0>();
        group_settled(scores);
    } else {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if constexpr (!HELD) left(queries[0], own, ROWS, 16 * warp, step);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                unsigned of_keys[4];
                right_by_rows(of_keys, keys, KEYS, 16 * n, step);
                multiply<T>(scores[2 * n], queries[HELD ? step : 0], of_keys[0], of_keys[1]);
                multiply<T>(scores[2 * n + 1], queries[HELD ? step : 0], of_keys[2], of_keys[3]);
            }
        }
    }
    if (key + KEYS - 1 > lowest || key <= lowest + 15 - window)
        hide(scores, KEYS, lowest - key, 1, -1, window, factor < 0.f ? INFINITE : -INFINITE);
    float highest[2] = {peak[0], peak[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[n][i] *= factor;
            highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
        }
    float against[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffff, highest[i], 1));
        highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffff, highest[i], 2));
        against[i] = highest[i] == -INFINITE ? 0.f : highest[i];
        const float kept = power_of_two(peak[i] - against[i]);
        peak[i] = highest[i];
        total[i] *= kept;
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
            sums[n][2 * i] *= kept;
            sums[n][2 * i + 1] *= kept;
        }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[n][i] = power_of_two(scores[n][i] - against[i / 2]);
            total[i / 2] += scores[n][i];
        }
    copies_wait<1>();
    if constexpr (GROUPED) group_sees();
    __syncthreads();
    if constexpr (GROUPED) {
        unsigned weights[KEYS / 16][4];
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) as_left(weights[step], scores, step);
        group_start();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++)
            group_multiply_turned<T>(sums, weights[step], values + 16 * step * 64, KEYS * 128);
        group_commit();
        group_wait<0>();
        group_settled(sums);
    } else {
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            unsigned weights[4];
            as_left(weights, scores, step);
#pragma unroll
            for (int n = 0; n < STEPS; n++) {
                unsigned of_values[4];
                right(of_values, values, KEYS, 16 * step, n);
                multiply<T>(sums[2 * n], weights, of_values[0], of_values[1]);
                multiply<T>(sums[2 * n + 1], weights, of_values[2], of_values[3]);
            }
        }
    }
}
#pragma unroll
for (int i = 0; i < 2; i++) {
    total[i] += __shfl_xor_sync(0xffffffff, total[i], 1);
    total[i] += __shfl_xor_sync(0xffffffff, total[i], 2);
    const int query = lowest + line + 8 * i;
    const bool counts = query >= begins && query < stop;
    if (pair == 0 && query < padded)
        normalizers[(int64_t(b) * H + h) * padded + query] = counts ? peak[i] + log2f(total[i]) : INFINITE;
    total[i] = counts ? 1.f / total[i] : 0.f;
}
if constexpr (GROUPED) __syncthreads();  // its last product may read rows of others
write(own, sums, total[0], total[1], out + h * SIZE, H * SIZE, first, true);
