"""Attention of one new token a row, on NVIDIA cards: norms, rotation, keeping keys and values, all in one kernel.

Two kernels do the same: one by the matrix units, for the 16-bit types of cards that have them, and one by plain sums
for everything else. Whoever reads them may begin with the plain one, `_BY_SUMS`. See `cuda_kernels.py` for when they
are compiled and what they are compared with.

Shapes: B rows, S prompts, w = B/S rows a prompt, H query heads, K key/value heads, R = H/K, d head size, P longest
 prompt, N places for own tokens. T is the type of the weights; sums are float32.

Sources: online softmax (arXiv:1805.02867), split over the context as in Flash-Decoding (arXiv:2311.01282).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.cuda_kernels import THREADS, are_here, kernel

_BLOCKS_WANTED = 528
"""Four for each multiprocessor of an H100: with fewer, the context is split among several."""
_LEAST_SPLIT = 128
"""Tokens of context that are worth a split."""
_LARGEST_GROUP = 1280
"""R·d: of each such number a block shares nine float32, beside 2.4 KB of its own."""

_HEAD_SIZES = frozenset({64, 128, 256})
"""Of each, sixteen lanes take parts that the card loads at once."""
_WARPS_WANTED = 1024
"""Eight for each multiprocessor of an H100: with fewer, several share the context of a row's heads."""
_WARPS_AT_ONCE = 4
"""Of a block, but where a team is larger."""
_LARGEST_TEAM = 8
_WORTH_JOINING = 2048
"""Tokens of context from which a second kernel, which joins what several blocks found, costs less than it saves."""
_LEAST_OF_BLOCK = 512
"""Tokens of context that a block is then left with, at the least."""
_LARGEST_GROUP_OF_UNITS = 1024
"""R·d: of each such number a block shares eight float32."""

_BY_SUMS = """
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
        const float norm = rsqrtf(squares / SIZE + constants[0]);
        for (int j = 0; j < PAIRS; j++) {
            const int i = place + 32 * j;
            const float cosine = cosines[slot * (SIZE / 2) + i], sine = sines[slot * (SIZE / 2) + i];
            const float x = low[j] * norm * float(scales[head * SIZE + i]);
            const float y = high[j] * norm * float(scales[head * SIZE + i + SIZE / 2]);
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
    const int each = (tokens + splits - 1) / splits;
    const int first = part * each, end = min(tokens, first + each);
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
"""

_BY_MATRIX_UNITS = """
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
        const float norm = rsqrtf(squares / SIZE + constants[0]);
        T* turned = r < R ? queries + r * SIZE : fresh[place][0];
        for (int j = 0; j < VALUE; j++) {
            const int i = lane + 32 * j;
            const float cosine = cosines[slot * (SIZE / 2) + i], sine = sines[slot * (SIZE / 2) + i];
            const float x = low[j] * norm * float(scales[head * SIZE + i]);
            const float y = high[j] * norm * float(scales[head * SIZE + i + SIZE / 2]);
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
    for (int base = (part * team + member) * 16; base <= tokens; base += splits * team * 16) {
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
        for (int i = 0; i < 4; i++) score[i] = base + g + 8 * (i / 2) <= tokens ? score[i] * scale : -1e30f;
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
"""

_JOIN = """
    // One warp a head: the parts of the context weighed against each other.
    const int lane = threadIdx.x % 32;
    const int head = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (head >= mixed_shape[0]) return;
    const int splits = mixed_shape[1];
    float all = -1e30f, whole = 0.f;
    for (int s = 0; s < splits; s++) all = fmaxf(all, parts[(head * splits + s) * 2]);
    float value[SIZE / 32];
    for (int j = 0; j < SIZE / 32; j++) value[j] = 0.f;
    for (int s = 0; s < splits; s++) {
        const float share = __expf(parts[(head * splits + s) * 2] - all);
        whole += share * parts[(head * splits + s) * 2 + 1];
        for (int j = 0; j < SIZE / 32; j++)
            value[j] += share * mixed[(size_t(head) * splits + s) * SIZE + lane + 32 * j];
    }
    for (int j = 0; j < SIZE / 32; j++) out[size_t(head) * SIZE + lane + 32 * j] = T(value[j] / whole);
"""

_INPUTS = (
    *("qkv", "scales", "cosines", "sines", "prompt_keys", "prompt_values"),
    *("own", "lengths", "step", "constants"),
)


class Plan(NamedTuple):
    """How the work of `attend` is divided."""

    by_units: bool
    """Whether by the matrix units."""
    grid: tuple[int, int, int]
    """Threads in all."""
    block: tuple[int, int, int]
    """Threads of a block."""
    splits: int
    """Blocks that share the context of a row's heads."""


def serve(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether `attend` knows heads of this kind, here: a warp each for a group's queries, key and value, and what all
    warps share of the queries in 48 KiB."""
    group = heads // kv_heads
    return are_here() and head_dim in _HEAD_SIZES and group <= 6 and group * head_dim <= _LARGEST_GROUP


def planned(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: mx.Dtype, context: int) -> Plan:
    """How to divide the work of so many rows, of which the longest sees `context` tokens."""
    pairs = rows * kv_heads
    group = heads // kv_heads
    if dtype.size > 2 or group * head_dim > _LARGEST_GROUP_OF_UNITS or not _have_matrix_units():
        splits = max(1, min(_BLOCKS_WANTED // pairs, context // _LEAST_SPLIT))
        return Plan(False, (pairs * splits * THREADS, 1, 1), (THREADS, 1, 1), splits)
    team = 1
    while team < _LARGEST_TEAM and pairs * team < _WARPS_WANTED:
        team *= 2
    together, splits = max(1, _WARPS_AT_ONCE // team), 1
    if context >= _WORTH_JOINING:
        splits = max(1, min(_WARPS_WANTED // (pairs * team), context // _LEAST_OF_BLOCK))
    return Plan(True, (32 * -(-pairs // together), team * splits, together), (32, team, together), splits)


@cache
def _have_matrix_units() -> bool:
    """Whether the card multiplies 16-bit matrices as `_BY_MATRIX_UNITS` asks: Ampere, or a later generation."""
    return int(mx.device_info().get("compute_capability_major", 8)) >= 8


def attend(
    qkv: mx.array,
    scales: mx.array,
    turn: tuple[mx.array, mx.array],
    prompts: tuple[mx.array, mx.array],
    own: mx.array,
    lengths: mx.array,
    step: mx.array,
    constants: mx.array,
    *,
    plan: Plan,
) -> mx.array:
    """The new token of every row: projections (B, (H + 2·K)·d) → attention (B, H·d).

    Writes the token's key and value into place `step` of `own`, which is against MLX's custom: an update of its own
    would copy all of `own` whenever an earlier step is still being computed. So `own` must be evaluated, contiguous and
    known to nobody else; and the next token's call sees what this one wrote because it depends on its result.

    `scales` (H + K, d) of the norms of queries and keys; `turn`: cosines and sines (S, d/2) of its position in float32;
    `prompts`: keys and values (S, K, P, d); `own` (B, 2·K, N, d): keys before values, of which the first `step` (1,)
    int32 places are taken; `lengths` (S,) int32 of the prompts; `constants` float32: (norms' ε, scale of the scores).
    """
    (B, wide), (_, K, _, d) = qkv.shape, prompts[0].shape
    R, splits = wide // d // K - 2, plan.splits
    kind = qkv.dtype if splits == 1 else mx.float32
    template = [("T", qkv.dtype), ("O", kind), ("HEADS", R * K), ("KV", K), ("R", R), ("SIZE", d)]
    template += [("BRAIN", qkv.dtype == mx.bfloat16), ("WHOLE", splits == 1)]
    name, source = ("attend_by_units", _BY_MATRIX_UNITS) if plan.by_units else ("attend_by_sums", _BY_SUMS)
    out, parts = kernel(name, _INPUTS, ("out", "parts"), source)(
        inputs=[qkv, scales, *turn, *prompts, own, lengths, step, constants],
        template=template,
        grid=plan.grid,
        threadgroup=plan.block,
        output_shapes=[(B * R * K, splits, d), (B * R * K, splits, 2)],
        output_dtypes=[kind, mx.float32],
    )
    if splits > 1:
        (out,) = kernel("join", ("mixed", "parts"), ("out",), _JOIN)(
            inputs=[out, parts],
            template=[("T", qkv.dtype), ("SIZE", d)],
            grid=(-(-B * R * K * 32 // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(B * R * K, d)],
            output_dtypes=[qkv.dtype],
        )
    attended: mx.array = out.reshape(B, R * K * d)
    return attended
