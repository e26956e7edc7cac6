// The body of a kernel that MLX makes a function of; shapes, types and names are told in cuda_kernels.py.
// A team of warps a row and key/value head, a warp sixteen tokens at a time: products by the matrix units, operands
// loaded as these want them. g is a lane's token, query or piece of a value, t its place beside.
constexpr int PIECES = SIZE / 8, KEY = SIZE / 32, VALUE = SIZE / 64, UNITS = SIZE / 8, TILES = UNITS / 2;
constexpr unsigned ALL = 0xffffffff;
struct alignas(16) Piece { unsigned x[4]; };
const int lane = threadIdx.x, member = threadIdx.y, team = blockDim.y, place = threadIdx.z;
const int warp = place * team + member, g = lane / 4, t = lane % 4;
const int rows = qkv_shape[0], width = rows / prompt_keys_shape[0];
const int P = prompt_keys_shape[2], N = own_shape[2];
const int pair = min(int(blockIdx.x * blockDim.z) + place, rows * KV - 1);
const int slot = pair / (width * KV), kv_head = pair / width % KV, row = slot * width + pair % width;
const int part = blockIdx.y, splits = gridDim.y;

__shared__ alignas(16) char shared[8 * R * SIZE * 4];
__shared__ alignas(16) T fresh[8][2][SIZE];
__shared__ float mosts[8][R], sums[8][R];

// The new token: queries and key normalized and turned, a head a warp.
T* queries = reinterpret_cast<T*>(shared) + place * R * SIZE;
const T* projected = qkv + size_t(row) * (HEADS + 2 * KV) * SIZE;
for (int r = member; r <= R; r += team) {
    const int head = r < R ? kv_head * R + r : HEADS + kv_head;
    const T* in = projected + head * SIZE;
    float low[VALUE], high[VALUE], squares = 0.f;
    for (int j = 0; j < VALUE; j++) {
        low[j] = float(in[lane + 32 * j]);
        high[j] = float(in[lane + 32 * j + SIZE / 2]);
        squares += low[j] * low[j] + high[j] * high[j];
    }
    for (int far = 16; far > 0; far /= 2) squares += __shfl_xor_sync(ALL, squares, far);
    const float norm = NORM ? rsqrtf(squares / SIZE + constants[0]) : 1.f;
    T* turned = r < R ? queries + r * SIZE : fresh[place][0];
    for (int j = 0; j < VALUE; j++) {
        const int i = lane + 32 * j;
        const float cosine = cosines[slot * (SIZE / 2) + i], sine = sines[slot * (SIZE / 2) + i];
        const float x = low[j] * norm * (NORM ? float(scales[head * SIZE + i]) : 1.f);
        const float y = high[j] * norm * (NORM ? float(scales[head * SIZE + i + SIZE / 2]) : 1.f);
        turned[i] = T(x * cosine - y * sine);
        turned[i + SIZE / 2] = T(y * cosine + x * sine);
    }
}
if (member == team - 1) {
    for (int i = lane; i < SIZE; i += 32) fresh[place][1][i] = projected[(HEADS + KV + kv_head) * SIZE + i];
}
__syncthreads();
const Piece* new_key = reinterpret_cast<const Piece*>(fresh[place][0]);
const Piece* new_value = reinterpret_cast<const Piece*>(fresh[place][1]);
Piece* own_keys = reinterpret_cast<Piece*>(const_cast<T*>(own)) + (size_t(row) * 2 * KV + kv_head) * N * PIECES;
Piece* own_values = own_keys + size_t(KV) * N * PIECES;
if (part == 0) {  // nobody reads this place before the next token
    for (int i = lane + 32 * member; i < PIECES; i += 32 * team) {
        own_keys[step[0] * PIECES + i] = new_key[i];
        own_values[step[0] * PIECES + i] = new_value[i];
    }
}

auto multiply = [](float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    if constexpr (BRAIN)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
};
auto turned_over = [](float x, float y) {  // 8 tokens × 8 queries: a token's two queries → a query's two tokens
    alignas(4) T two[2] = {T(x), T(y)};
    unsigned over;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(over) : "r"(*reinterpret_cast<unsigned*>(two)));
    return over;
};

const int prompt_tokens = lengths[slot], tokens = prompt_tokens + step[0];
const Piece* prompt_k = reinterpret_cast<const Piece*>(prompt_keys) + (size_t(slot) * KV + kv_head) * P * PIECES;
const Piece* prompt_v = reinterpret_cast<const Piece*>(prompt_values) + (size_t(slot) * KV + kv_head) * P * PIECES;
auto token_of = [&](const Piece* of_prompt, const Piece* of_own, const Piece* newest, int token) {
    token = min(token, tokens);
    return token < prompt_tokens ? of_prompt + size_t(token) * PIECES
         : token < tokens ? of_own + size_t(token - prompt_tokens) * PIECES : newest;
};
Piece query[KEY];
for (int j = 0; j < KEY; j++)
    query[j] = g < R ? reinterpret_cast<const Piece*>(queries + g * SIZE)[t + 4 * j] : Piece{{0, 0, 0, 0}};
float mixed[TILES][4], most[2] = {-1e30f, -1e30f}, sum[2] = {0.f, 0.f};
for (int i = 0; i < TILES; i++) mixed[i][0] = mixed[i][1] = mixed[i][2] = mixed[i][3] = 0.f;
const float scale = constants[1] * 1.44269504f;
const int begin = WINDOW ? max(0, tokens + 1 - WINDOW) : 0;  // the first token that the new one sees
for (int base = begin / 16 * 16 + (part * team + member) * 16; base <= tokens; base += splits * team * 16) {
    Piece key[2][KEY], value[4][VALUE];
    #pragma unroll
    for (int u = 0; u < 2; u++) {
        const Piece* from = token_of(prompt_k, own_keys, new_key, base + g + 8 * u);
        #pragma unroll
        for (int j = 0; j < KEY; j++) key[u][j] = from[t + 4 * j];
    }
    #pragma unroll
    for (int u = 0; u < 4; u++) {
        const Piece* from = token_of(prompt_v, own_values, new_value, base + 2 * t + u % 2 + 8 * (u / 2));
        #pragma unroll
        for (int c = 0; c < VALUE; c++) value[u][c] = from[g + 8 * c];
    }
    float score[4] = {0.f, 0.f, 0.f, 0.f};  // of tokens g and g + 8 for queries 2t and 2t + 1
    #pragma unroll
    for (int j = 0; j < KEY; j++) {
        const unsigned *a = key[0][j].x, *b = key[1][j].x, *asked = query[j].x;
        multiply(score, a[0], b[0], a[1], b[1], asked[0], asked[1]);
        multiply(score, a[2], b[2], a[3], b[3], asked[2], asked[3]);
    }
    for (int i = 0; i < 4; i++) {
        const int token = base + g + 8 * (i / 2);
        score[i] = token >= begin && token <= tokens ? score[i] * scale : -1e30f;
    }
    float now[2];
    for (int i = 0; i < 2; i++) {
        now[i] = fmaxf(most[i], fmaxf(score[i], score[i + 2]));
        for (int far = 4; far < 32; far *= 2) now[i] = fmaxf(now[i], __shfl_xor_sync(ALL, now[i], far));
    }
    if (__any_sync(ALL, now[0] > most[0] || now[1] > most[1])) {
        const float before[2] = {exp2f(most[0] - now[0]), exp2f(most[1] - now[1])};
        for (int i = 0; i < 2; i++) { sum[i] *= before[i]; most[i] = now[i]; }
        #pragma unroll
        for (int i = 0; i < TILES; i++)
            for (int c = 0; c < 4; c++) mixed[i][c] *= before[c % 2];
    }
    for (int i = 0; i < 4; i++) score[i] = exp2f(score[i] - most[i % 2]);
    sum[0] += score[0] + score[2];
    sum[1] += score[1] + score[3];
    const unsigned share[2] = {turned_over(score[0], score[1]), turned_over(score[2], score[3])};
    #pragma unroll
    for (int i = 0; i < TILES; i++) {  // of a value's numbers 8·piece + e, for e below and above the middle
        unsigned a[4];
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            const int unit = i + k % 2 * TILES, c = unit / 8, e = unit % 8;
            const unsigned one = value[k / 2 * 2][c].x[e / 2], next = value[k / 2 * 2 + 1][c].x[e / 2];
            a[k] = __byte_perm(one, next, e % 2 ? 0x7632 : 0x5410);
        }
        multiply(mixed[i], a[0], a[1], a[2], a[3], share[0], share[1]);
    }
}

// All shares together: the lanes' sums, then the warps of the team.
for (int i = 0; i < 2; i++)
    for (int far = 4; far < 32; far *= 2) sum[i] += __shfl_xor_sync(ALL, sum[i], far);
__syncthreads();  // the queries have been read
float* mixes = reinterpret_cast<float*>(shared);
for (int i = 0; i < 2; i++) {
    const int r = 2 * t + i;
    if (r >= R) continue;
    if (g == 0) { mosts[warp][r] = most[i]; sums[warp][r] = sum[i]; }
    #pragma unroll
    for (int u = 0; u < UNITS; u++)
        mixes[(warp * R + r) * SIZE + (u / 8 * 8 + g) * 8 + u % 8] = mixed[u % TILES][u / TILES * 2 + i];
}
__syncthreads();
for (int i = lane + 32 * member; i < R * SIZE; i += 32 * team) {
    const int r = i / SIZE, e = i % SIZE, first = place * team;
    float all = -1e30f, whole = 0.f, value = 0.f;
    for (int m = first; m < first + team; m++) all = fmaxf(all, mosts[m][r]);
    for (int m = first; m < first + team; m++) {
        const float share = exp2f(mosts[m][r] - all);
        whole += sums[m][r] * share;
        value += mixes[(m * R + r) * SIZE + e] * share;
    }
    const size_t head = size_t(row) * HEADS + kv_head * R + r;
    if (WHOLE) {
        out[head * SIZE + e] = O(value / whole);
    } else {
        out[(head * splits + part) * SIZE + e] = O(value);
        if (e == 0) {
            parts[(head * splits + part) * 2] = all * 0.69314718f;
            parts[(head * splits + part) * 2 + 1] = whole;
        }
    }
}
