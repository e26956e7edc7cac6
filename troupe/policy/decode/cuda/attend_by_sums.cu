// The body of a kernel that MLX makes a function of; shapes, types and names are told in cuda_kernels.py.
// One block a row, a key/value head and a part of the context; sixteen lanes a token.
constexpr int E = SIZE / 16, GROUPS = 16, WARPS = 8, AT_ONCE = 4, PAIRS = SIZE / 64;
struct alignas(E * sizeof(T)) Pack { T x[E]; };
const int rows = qkv_shape[0], splits = WHOLE ? 1 : gridDim.x / (rows * KV);
const int part = blockIdx.x % splits, kv_head = blockIdx.x / splits % KV, row = blockIdx.x / splits / KV;
const int lane = threadIdx.x % 16, group = threadIdx.x / 16, slot = row / (rows / prompt_keys_shape[0]);
const int warp = threadIdx.x / 32, place = threadIdx.x % 32;
const int P = prompt_keys_shape[2], N = own_shape[2];

// The new token: queries and key normalized and turned, a head a warp.
__shared__ float ask_all[R][SIZE];
__shared__ T new_key[SIZE], new_value[SIZE];
const T* projected = qkv + size_t(row) * (HEADS + 2 * KV) * SIZE;
if (warp <= R) {
    const int head = warp < R ? kv_head * R + warp : HEADS + kv_head;
    const T* in = projected + head * SIZE;
    float low[PAIRS], high[PAIRS], squares = 0.f;
    for (int j = 0; j < PAIRS; j++) {
        low[j] = float(in[place + 32 * j]);
        high[j] = float(in[place + 32 * j + SIZE / 2]);
        squares += low[j] * low[j] + high[j] * high[j];
    }
    for (int far = 16; far > 0; far /= 2) squares += __shfl_xor_sync(0xffffffff, squares, far);
    const float norm = NORM ? rsqrtf(squares / SIZE + constants[0]) : 1.f;
    for (int j = 0; j < PAIRS; j++) {
        const int i = place + 32 * j;
        const float cosine = cosines[slot * (SIZE / 2) + i], sine = sines[slot * (SIZE / 2) + i];
        const float x = low[j] * norm * (NORM ? float(scales[head * SIZE + i]) : 1.f);
        const float y = high[j] * norm * (NORM ? float(scales[head * SIZE + i + SIZE / 2]) : 1.f);
        const float left = x * cosine - y * sine, right = y * cosine + x * sine;
        if (warp < R) {
            ask_all[warp][i] = left * constants[1];
            ask_all[warp][i + SIZE / 2] = right * constants[1];
        } else {
            new_key[i] = T(left);
            new_key[i + SIZE / 2] = T(right);
        }
    }
} else if (warp == R + 1) {
    for (int i = place; i < SIZE; i += 32) new_value[i] = projected[(HEADS + KV + kv_head) * SIZE + i];
}
__syncthreads();
if (part == 0) {  // nobody reads this place before the next token
    T* keys = const_cast<T*>(own) + ((size_t(row) * 2 * KV + kv_head) * N + step[0]) * SIZE;
    T* values = const_cast<T*>(own) + ((size_t(row) * 2 * KV + KV + kv_head) * N + step[0]) * SIZE;
    for (int i = threadIdx.x; i < SIZE; i += blockDim.x) {
        keys[i] = new_key[i];
        values[i] = new_value[i];
    }
}

// What came before, a token a group, several on their way at once.
const int prompt_tokens = lengths[slot], tokens = prompt_tokens + step[0];
const int begin = WINDOW ? max(0, tokens + 1 - WINDOW) : 0;  // what the new token sees, itself apart
const int each = (tokens - begin + splits - 1) / splits;
const int first = begin + part * each, end = min(tokens, first + each);
const Pack* pk = reinterpret_cast<const Pack*>(prompt_keys + (size_t(slot) * KV + kv_head) * P * SIZE);
const Pack* pv = reinterpret_cast<const Pack*>(prompt_values + (size_t(slot) * KV + kv_head) * P * SIZE);
const Pack* ok = reinterpret_cast<const Pack*>(own + (size_t(row) * 2 * KV + kv_head) * N * SIZE);
const Pack* ov = reinterpret_cast<const Pack*>(own + (size_t(row) * 2 * KV + KV + kv_head) * N * SIZE);
float ask[R][E], mixed[R][E], most[R], sum[R];
for (int r = 0; r < R; r++) {
    for (int e = 0; e < E; e++) { ask[r][e] = ask_all[r][lane * E + e]; mixed[r][e] = 0.f; }
    most[r] = -1e30f; sum[r] = 0.f;
}
auto look = [&](const Pack& key, const Pack& value, bool there) {
    for (int r = 0; r < R; r++) {
        float score = 0.f;
        for (int e = 0; e < E; e++) score += ask[r][e] * float(key.x[e]);
        for (int far = 8; far > 0; far /= 2) score += __shfl_xor_sync(0xffffffff, score, far);
        if (!there) continue;
        const float now = fmaxf(most[r], score), before = __expf(most[r] - now), share = __expf(score - now);
        sum[r] = sum[r] * before + share;
        for (int e = 0; e < E; e++) mixed[r][e] = mixed[r][e] * before + share * float(value.x[e]);
        most[r] = now;
    }
};
for (int base = first; base < end; base += GROUPS * AT_ONCE) {  // whole warps go on together, for sums over lanes
    Pack key[AT_ONCE], value[AT_ONCE];
    #pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
        const int token = min(base + u * GROUPS + group, end - 1), own_token = token - prompt_tokens;
        key[u] = own_token >= 0 ? ok[own_token * 16 + lane] : pk[token * 16 + lane];
        value[u] = own_token >= 0 ? ov[own_token * 16 + lane] : pv[token * 16 + lane];
    }
    #pragma unroll
    for (int u = 0; u < AT_ONCE; u++) look(key[u], value[u], base + u * GROUPS + group < end);
}
if (part == splits - 1 && warp == 0) {
    look(reinterpret_cast<const Pack*>(new_key)[lane], reinterpret_cast<const Pack*>(new_value)[lane], group == 0);
}

// All groups' shares together: first the two of a warp, then the warps.
__shared__ float mosts[R][WARPS], sums[R][WARPS], mixes[R][WARPS][SIZE];
for (int r = 0; r < R; r++) {
    const float other = __shfl_xor_sync(0xffffffff, most[r], 16), both = fmaxf(most[r], other);
    const float mine = __expf(most[r] - both);
    sum[r] *= mine;
    sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 16);
    for (int e = 0; e < E; e++) {
        mixed[r][e] *= mine;
        mixed[r][e] += __shfl_xor_sync(0xffffffff, mixed[r][e], 16);
        if (place < 16) mixes[r][warp][lane * E + e] = mixed[r][e];
    }
    if (place == 0) { mosts[r][warp] = both; sums[r][warp] = sum[r]; }
}
__syncthreads();
for (int i = threadIdx.x; i < R * SIZE; i += blockDim.x) {
    const int r = i / SIZE, e = i % SIZE;
    float all = -1e30f, whole = 0.f, value = 0.f;
    for (int g = 0; g < WARPS; g++) all = fmaxf(all, mosts[r][g]);
    for (int g = 0; g < WARPS; g++) {
        const float share = __expf(mosts[r][g] - all);
        whole += sums[r][g] * share;
        value += mixes[r][g][e] * share;
    }
    const size_t head = size_t(row) * HEADS + kv_head * R + r;
    if (WHOLE) {
        out[head * SIZE + e] = O(value / whole);
    } else {
        out[(head * splits + part) * SIZE + e] = O(value);
        if (e == 0) {
            parts[(head * splits + part) * 2] = all;
            parts[(head * splits + part) * 2 + 1] = whole;
        }
    }
}
