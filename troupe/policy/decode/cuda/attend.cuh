// Attention of one new token a row by the matrix units, operands loaded as these want them: what a block of WARPS warps
// does for up to 16 / R rows of one prompt and one key/value head, which it is given as `item`.
// The prompt's keys meet the queries of all these rows at once, sixteen tokens a warp at a time; then each row's own
// tokens, a team of warps a row. g is a lane's token, query or piece of a value, t its place beside.
#pragma once

struct alignas(16) Piece { unsigned x[4]; };

template <typename T>
__device__ __forceinline__ unsigned paired(float x, float y) {
    alignas(4) T two[2] = {T(x), T(y)};
    return *reinterpret_cast<unsigned*>(two);
}

// The numbers e of two tokens' pieces, side by side.
__device__ __forceinline__ unsigned zipped(const Piece& one, const Piece& next, int e) {
    return __byte_perm(one.x[e / 2], next.x[e / 2], e % 2 ? 0x7632 : 0x5410);
}

// What a block shares, in floats and numbers of T, 16-byte pieces throughout.
template <typename T, int R, int SIZE, int WARPS>
struct AttendShared {
    static constexpr int ROWS = 16 / R, OWN = WARPS * R > 16 ? WARPS * R : 16;
    T queries[16][SIZE + 8];
    T fresh[ROWS][2][SIZE];
    float mixes[WARPS][16][SIZE + 4], own_mixes[OWN][SIZE];
    float mosts[WARPS][16], sums[WARPS][16], own_mosts[OWN], own_sums[OWN];
};

template <typename T, typename Scales>
struct AttendInputs {
    const T* qkv;                       // (B, (H + 2·K)·d)
    const Scales* scales;               // (H + K, d), of T or, where families add to what they hold, float32
    const float *cosines, *sines;       // (S, d/2)
    const T *prompt_keys, *prompt_values;  // (S, K, P, d)
    T* own;                             // (B, 2·K, N, d)
    const int* lengths;                 // (S,)
    float epsilon, scale;
    int step, width, together, P, N;    // own tokens before this one; rows a prompt, and of these at once at most; places
};

template <
    typename T, typename O, int HEADS, int KV, int SIZE, bool NORM, int WINDOW, bool WHOLE, int WARPS, typename Scales>
__device__ void attend_rows(
    const AttendInputs<T, Scales>& in, int item, int part, int splits, AttendShared<T, HEADS / KV, SIZE, WARPS>& shared,
    O* out, float* parts) {
    constexpr int R = HEADS / KV, PIECES = SIZE / 8, KEY = SIZE / 32, VALUE = SIZE / 64, HALVES = SIZE / 64, TILES = SIZE / 8;
    constexpr unsigned ALL = 0xffffffff;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int chunks = (in.width + in.together - 1) / in.together, most_rows = (in.width + chunks - 1) / chunks;
    const int slot = item / (chunks * KV), kv_head = item / chunks % KV, first = item % chunks * most_rows;
    const int count = min(most_rows, in.width - first), row0 = slot * in.width + first;
    int team = 1;
    while (2 * team * count <= WARPS) team *= 2;
    const int step = in.step, length = in.lengths[slot];
    const int begin = WINDOW ? max(0, length + step + 1 - WINDOW) : 0;  // the first token that the new one sees

    // The new token: queries and keys normalized and turned, a head a warp; all that a warp does is loaded at once.
    constexpr int HEADS_A_WARP = (16 / R * (R + 1) + WARPS - 1) / WARPS;
    float low[HEADS_A_WARP][HALVES], high[HEADS_A_WARP][HALVES];
    #pragma unroll
    for (int n = 0; n < HEADS_A_WARP; n++) {
        const int h = warp + n * WARPS, r = h % (R + 1);
        if (h >= count * (R + 1)) continue;
        const T* from = in.qkv + (size_t(row0 + h / (R + 1)) * (HEADS + 2 * KV) + (r < R ? kv_head * R + r : HEADS + kv_head)) * SIZE;
        #pragma unroll
        for (int j = 0; j < HALVES; j++) {
            low[n][j] = float(from[lane + 32 * j]);
            high[n][j] = float(from[lane + 32 * j + SIZE / 2]);
        }
        if (r < R) continue;
        for (int i = lane; i < SIZE; i += 32) shared.fresh[h / (R + 1)][1][i] = from[KV * SIZE + i];
    }
    #pragma unroll
    for (int n = 0; n < HEADS_A_WARP; n++) {
        const int h = warp + n * WARPS, r = h % (R + 1), head = r < R ? kv_head * R + r : HEADS + kv_head;
        if (h >= count * (R + 1)) continue;
        float squares = 0.f;
        #pragma unroll
        for (int j = 0; j < HALVES; j++) squares += low[n][j] * low[n][j] + high[n][j] * high[n][j];
        for (int far = 16; far > 0; far /= 2) squares += __shfl_xor_sync(ALL, squares, far);
        const float norm = NORM ? rsqrtf(squares / SIZE + in.epsilon) : 1.f;
        T* turned = r < R ? shared.queries[h / (R + 1) * R + r] : shared.fresh[h / (R + 1)][0];
        #pragma unroll
        for (int j = 0; j < HALVES; j++) {
            const int i = lane + 32 * j;
            const float cosine = in.cosines[slot * (SIZE / 2) + i], sine = in.sines[slot * (SIZE / 2) + i];
            const float x = low[n][j] * norm * (NORM ? float(in.scales[head * SIZE + i]) : 1.f);
            const float y = high[n][j] * norm * (NORM ? float(in.scales[head * SIZE + i + SIZE / 2]) : 1.f);
            turned[i] = T(x * cosine - y * sine);
            turned[i + SIZE / 2] = T(y * cosine + x * sine);
        }
    }
    for (int i = threadIdx.x; i < (16 - count * R) * SIZE; i += 32 * WARPS)
        shared.queries[count * R + i / SIZE][i % SIZE] = T(0.f);
    __syncthreads();
    if (part == 0) {  // nobody reads this place before the next token
        for (int i = threadIdx.x; i < count * 2 * PIECES; i += 32 * WARPS) {
            const int c = i / (2 * PIECES), which = i / PIECES % 2;
            Piece* place = reinterpret_cast<Piece*>(in.own) +
                           ((size_t(row0 + c) * 2 * KV + which * KV + kv_head) * in.N + step) * PIECES;
            place[i % PIECES] = reinterpret_cast<const Piece*>(shared.fresh[c][which])[i % PIECES];
        }
    }

    // The prompt: sixteen queries and sixteen tokens at a time.
    {
        const Piece* keys = reinterpret_cast<const Piece*>(in.prompt_keys) + (size_t(slot) * KV + kv_head) * in.P * PIECES;
        const Piece* values = reinterpret_cast<const Piece*>(in.prompt_values) + (size_t(slot) * KV + kv_head) * in.P * PIECES;
        float mixed[TILES][4], most[2] = {-1e30f, -1e30f}, sum[2] = {0.f, 0.f};
        #pragma unroll
        for (int i = 0; i < TILES; i++) mixed[i][0] = mixed[i][1] = mixed[i][2] = mixed[i][3] = 0.f;
        for (int base = begin / 16 * 16 + (part * WARPS + warp) * 16; base < length && begin < length;
             base += splits * WARPS * 16) {
            Piece key[2][KEY], value[4][VALUE];
            #pragma unroll
            for (int u = 0; u < 2; u++) {
                const Piece* from = keys + size_t(min(base + g + 8 * u, length - 1)) * PIECES;
                #pragma unroll
                for (int j = 0; j < KEY; j++) key[u][j] = from[t + 4 * j];
            }
            #pragma unroll
            for (int u = 0; u < 4; u++) {
                const Piece* from = values + size_t(min(base + 2 * t + u % 2 + 8 * (u / 2), length - 1)) * PIECES;
                #pragma unroll
                for (int c = 0; c < VALUE; c++) value[u][c] = from[g + 8 * c];
            }
            float score[2][4];
            #pragma unroll
            for (int u = 0; u < 2; u++) score[u][0] = score[u][1] = score[u][2] = score[u][3] = 0.f;
            #pragma unroll
            for (int j = 0; j < KEY; j++) {
                const Piece low = reinterpret_cast<const Piece*>(shared.queries[g])[t + 4 * j];
                const Piece high = reinterpret_cast<const Piece*>(shared.queries[g + 8])[t + 4 * j];
                const unsigned a[4] = {low.x[0], high.x[0], low.x[1], high.x[1]};
                const unsigned b[4] = {low.x[2], high.x[2], low.x[3], high.x[3]};
                #pragma unroll
                for (int u = 0; u < 2; u++) {
                    multiply<T>(score[u], a, key[u][j].x[0], key[u][j].x[1]);
                    multiply<T>(score[u], b, key[u][j].x[2], key[u][j].x[3]);
                }
            }
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                float now = most[h];
                #pragma unroll
                for (int u = 0; u < 4; u++) {
                    const int token = base + 8 * (u / 2) + 2 * t + u % 2;
                    float& x = score[u / 2][2 * h + u % 2];
                    x = token >= begin && token < length ? x * in.scale : -1e30f;
                    now = fmaxf(now, x);
                }
                now = fmaxf(now, __shfl_xor_sync(ALL, now, 1));
                now = fmaxf(now, __shfl_xor_sync(ALL, now, 2));
                const float before = exp2f(most[h] - now);
                most[h] = now;
                sum[h] *= before;
                #pragma unroll
                for (int u = 0; u < 4; u++) {
                    float& x = score[u / 2][2 * h + u % 2];
                    x = exp2f(x - now);
                    sum[h] += x;
                }
                #pragma unroll
                for (int i = 0; i < TILES * 2; i++) mixed[i / 2][2 * h + i % 2] *= before;
            }
            const unsigned a[4] = {paired<T>(score[0][0], score[0][1]), paired<T>(score[0][2], score[0][3]),
                                   paired<T>(score[1][0], score[1][1]), paired<T>(score[1][2], score[1][3])};
            #pragma unroll
            for (int c = 0; c < VALUE; c++)
                #pragma unroll
                for (int e = 0; e < 8; e++)
                    multiply<T>(mixed[8 * c + e], a, zipped(value[0][c], value[1][c], e), zipped(value[2][c], value[3][c], e));
        }
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(ALL, sum[h], 1);
            sum[h] += __shfl_xor_sync(ALL, sum[h], 2);
            if (t == 0) { shared.mosts[warp][g + 8 * h] = most[h]; shared.sums[warp][g + 8 * h] = sum[h]; }
            #pragma unroll
            for (int c = 0; c < VALUE; c++)
                #pragma unroll
                for (int i = 0; i < 4; i++) {  // of a query the numbers 8·piece + e, four at a time
                    float four[4];
                    #pragma unroll
                    for (int e = 0; e < 4; e++) four[e] = mixed[8 * c + i % 2 * 4 + e][2 * h + i / 2];
                    *reinterpret_cast<float4*>(&shared.mixes[warp][g + 8 * h][8 * (2 * t + i / 2 + 8 * c) + i % 2 * 4]) =
                        make_float4(four[0], four[1], four[2], four[3]);
                }
        }
    }

    // A row's own tokens: sixteen at a time meet the queries of the row.
    for (int c = warp / team; c < count; c += WARPS / team) {
        const int member = warp % team;
        const Piece* keys = reinterpret_cast<const Piece*>(in.own) + (size_t(row0 + c) * 2 * KV + kv_head) * in.N * PIECES;
        const Piece* values = keys + size_t(KV) * in.N * PIECES;
        const Piece* new_key = reinterpret_cast<const Piece*>(shared.fresh[c][0]);
        const Piece* new_value = reinterpret_cast<const Piece*>(shared.fresh[c][1]);
        const int from_own = max(0, begin - length);
        Piece query[KEY];
        #pragma unroll
        for (int j = 0; j < KEY; j++)
            query[j] = g < R ? reinterpret_cast<const Piece*>(shared.queries[c * R + g])[t + 4 * j] : Piece{{0, 0, 0, 0}};
        float mixed[TILES / 2][4], most[2] = {-1e30f, -1e30f}, sum[2] = {0.f, 0.f};
        #pragma unroll
        for (int i = 0; i < TILES / 2; i++) mixed[i][0] = mixed[i][1] = mixed[i][2] = mixed[i][3] = 0.f;
        for (int base = from_own / 16 * 16 + (part * team + member) * 16; base <= step; base += splits * team * 16) {
            Piece key[2][KEY], value[4][VALUE];
            #pragma unroll
            for (int u = 0; u < 2; u++) {
                const int token = base + g + 8 * u;
                const Piece* from = token < step ? keys + size_t(token) * PIECES : new_key;
                #pragma unroll
                for (int j = 0; j < KEY; j++) key[u][j] = from[t + 4 * j];
            }
            #pragma unroll
            for (int u = 0; u < 4; u++) {
                const int token = base + 2 * t + u % 2 + 8 * (u / 2);
                const Piece* from = token < step ? values + size_t(token) * PIECES : new_value;
                #pragma unroll
                for (int v = 0; v < VALUE; v++) value[u][v] = from[g + 8 * v];
            }
            float score[4] = {0.f, 0.f, 0.f, 0.f};  // of tokens g and g + 8 for queries 2t and 2t + 1
            #pragma unroll
            for (int j = 0; j < KEY; j++) {
                const unsigned a[4] = {key[0][j].x[0], key[1][j].x[0], key[0][j].x[1], key[1][j].x[1]};
                const unsigned b[4] = {key[0][j].x[2], key[1][j].x[2], key[0][j].x[3], key[1][j].x[3]};
                multiply<T>(score, a, query[j].x[0], query[j].x[1]);
                multiply<T>(score, b, query[j].x[2], query[j].x[3]);
            }
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = base + g + 8 * (i / 2);
                score[i] = token >= from_own && token <= step ? score[i] * in.scale : -1e30f;
            }
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                float now = fmaxf(most[i], fmaxf(score[i], score[i + 2]));
                for (int far = 4; far < 32; far *= 2) now = fmaxf(now, __shfl_xor_sync(ALL, now, far));
                const float before = exp2f(most[i] - now);
                most[i] = now;
                score[i] = exp2f(score[i] - now);
                score[i + 2] = exp2f(score[i + 2] - now);
                sum[i] = sum[i] * before + (score[i] + score[i + 2]);
                #pragma unroll
                for (int k = 0; k < TILES; k++) mixed[k / 2][k % 2 * 2 + i] *= before;
            }
            const unsigned shares[2] = {turn_over(paired<T>(score[0], score[1])), turn_over(paired<T>(score[2], score[3]))};
            #pragma unroll
            for (int i = 0; i < TILES / 2; i++) {  // of a value's numbers 8·piece + e, for e below and above the middle
                unsigned a[4];
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int unit = i + k % 2 * (TILES / 2), v = unit / 8, e = unit % 8;
                    a[k] = zipped(value[k / 2 * 2][v], value[k / 2 * 2 + 1][v], e);
                }
                multiply<T>(mixed[i], a, shares[0], shares[1]);
            }
        }
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            for (int far = 4; far < 32; far *= 2) sum[i] += __shfl_xor_sync(ALL, sum[i], far);
            const int r = 2 * t + i, place = (c * team + member) * R + r;
            if (r >= R) continue;
            if (g == 0) { shared.own_mosts[place] = most[i]; shared.own_sums[place] = sum[i]; }
            #pragma unroll
            for (int u = 0; u < TILES; u++)
                shared.own_mixes[place][(u / 8 * 8 + g) * 8 + u % 8] = mixed[u % (TILES / 2)][u / (TILES / 2) * 2 + i];
        }
    }
    __syncthreads();

    // All parts together, each by its share: of the prompt by warp, then the row's own by member.
    for (int q = threadIdx.x; q < count * R; q += 32 * WARPS) {
        const int own = q / R * team * R + q % R;
        float all = -1e30f, whole = 0.f;
        for (int m = 0; m < WARPS; m++) all = fmaxf(all, shared.mosts[m][q]);
        for (int m = 0; m < team; m++) all = fmaxf(all, shared.own_mosts[own + m * R]);
        for (int m = 0; m < WARPS; m++) {
            const float share = exp2f(shared.mosts[m][q] - all);
            whole += shared.sums[m][q] * share;
            shared.mosts[m][q] = share;
        }
        for (int m = 0; m < team; m++) {
            const float share = exp2f(shared.own_mosts[own + m * R] - all);
            whole += shared.own_sums[own + m * R] * share;
            shared.own_mosts[own + m * R] = share;
        }
        shared.sums[0][q] = WHOLE ? 1.f / whole : 1.f;
        if (!WHOLE) {
            const size_t head = size_t(row0 + q / R) * HEADS + kv_head * R + q % R;
            parts[(head * splits + part) * 2] = all * 0.69314718f;
            parts[(head * splits + part) * 2 + 1] = whole;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * R * SIZE / 4; i += 32 * WARPS) {
        const int q = i / (SIZE / 4), e = i % (SIZE / 4) * 4, own = q / R * team * R + q % R;
        float value[4] = {0.f, 0.f, 0.f, 0.f};
        #pragma unroll
        for (int m = 0; m < WARPS; m++) {
            const float4 mix = *reinterpret_cast<const float4*>(&shared.mixes[m][q][e]);
            const float share = shared.mosts[m][q];
            value[0] += mix.x * share, value[1] += mix.y * share, value[2] += mix.z * share, value[3] += mix.w * share;
        }
        for (int m = 0; m < team; m++) {
            const float4 mix = *reinterpret_cast<const float4*>(&shared.own_mixes[own + m * R][e]);
            const float share = shared.own_mosts[own + m * R];
            value[0] += mix.x * share, value[1] += mix.y * share, value[2] += mix.z * share, value[3] += mix.w * share;
        }
        const size_t head = size_t(row0 + q / R) * HEADS + kv_head * R + q % R;
        O* to = out + (head * splits + part) * SIZE + e;  // without splits, part is 0 and splits 1
        for (int k = 0; k < 4; k++) to[k] = O(value[k] * shared.sums[0][q]);
    }
}
