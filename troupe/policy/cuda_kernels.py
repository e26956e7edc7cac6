"""Kernels of our own for one new token a row, on NVIDIA cards: a layer in ten launches instead of thirty.

A decoding step of a small model costs what its launches cost, not what it computes. MLX compiles the sources when they
are first used, once for each type and kind of head: numbers of rows and tokens are told when they run. Each kernel has
its plain twin in MLX's own operations (`qwen3.py`, `cache.py`, `drawing.py`), which serves every other device and is
what the tests compare with. Knows nothing of requests, weights and caches.

Shapes: B rows, S prompts, w = B/S rows a prompt, H query heads, K key/value heads, R = H/K, d head size (a multiple of
64), P longest prompt, N places for own tokens. T is the type of the weights; sums are float32.

Sources: online softmax (arXiv:1805.02867), split over the context as in Flash-Decoding (arXiv:2311.01282).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

_THREADS = 256
_BLOCKS_WANTED = 528
"""Four for each multiprocessor of an H100: with fewer, the context is split among several."""
_LEAST_SPLIT = 128
"""Tokens of context that are worth a split."""
_LARGEST_GROUP = 1280
"""R·d: of each such number a block shares nine float32, beside 2.4 KB of its own."""

_ATTEND = """
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

_GATE = """
    const size_t place = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t wide = both_shape[1] / 2, row = place / wide, column = place % wide;
    if (row >= both_shape[0]) return;
    const float gate = float(both[row * 2 * wide + column]), up = float(both[row * 2 * wide + wide + column]);
    out[place] = T(gate / (1.f + __expf(-gate)) * up);
"""


_DRAW = """
    // One block a row, a stretch of the vocabulary a warp: largest and sum, then the id that the target lies in.
    const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int V = logits_shape[1], stretch = (V + 31) / 32, first = warp * stretch, end = min(V, first + stretch);
    const T* mine = logits + size_t(row) * V;
    float most = -1e30f, sum = 0.f;
    for (int i = first + lane; i < end; i += 32) {
        const float x = float(mine[i]) * constants[0];
        if (x > most) { sum = sum * __expf(most - x) + 1.f; most = x; }
        else sum += __expf(x - most);
    }
    for (int far = 16; far > 0; far /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, most, far), more = __shfl_xor_sync(0xffffffff, sum, far);
        const float both = fmaxf(most, other);
        sum = sum * __expf(most - both) + more * __expf(other - both);
        most = both;
    }
    __shared__ float mosts[32], sums[32];
    if (lane == 0) { mosts[warp] = most; sums[warp] = sum; }
    __syncthreads();
    float all = -1e30f, whole = 0.f;
    for (int g = 0; g < 32; g++) all = fmaxf(all, mosts[g]);
    for (int g = 0; g < 32; g++) whole += sums[g] * __expf(mosts[g] - all);
    const float target = fminf(uniforms[row], 0.99999994f) * whole;
    int chosen = -1, last = 0;
    float before = 0.f, begun = 0.f;
    for (int g = 0; g < 32; g++) {
        const float share = sums[g] * __expf(mosts[g] - all);
        if (share > 0.f) { last = g; begun = before; }
        before += share;
        if (share > 0.f && before > target) { chosen = g; break; }
    }
    if (chosen < 0) chosen = last;  // rounding
    if (warp != chosen) return;
    float running = begun, found_x = 0.f;
    int found = -1;
    for (int base = first; base < end; base += 32) {
        const int i = base + lane;
        const float x = i < end ? float(mine[i]) * constants[0] : -1e30f;
        const float share = i < end ? __expf(x - all) : 0.f;
        float upto = share;
        for (int far = 1; far < 32; far *= 2) {
            const float left = __shfl_up_sync(0xffffffff, upto, far);
            if (lane >= far) upto += left;
        }
        const unsigned there = __ballot_sync(0xffffffff, share > 0.f);
        const unsigned past = __ballot_sync(0xffffffff, share > 0.f && running + upto > target);
        if (there) {  // should rounding leave nobody past the target: the last who has a share
            const int who = past ? __ffs(past) - 1 : 31 - __clz(there);
            found = base + who;
            found_x = __shfl_sync(0xffffffff, x, who);
        }
        if (past) break;
        running += __shfl_sync(0xffffffff, upto, 31);
    }
    if (lane == 0) {
        ids[row] = unsigned(max(found, 0));  // below 0 where a logit is NaN
        log_probs[row] = found_x - all - logf(whole);
    }
"""


_PLACES = ("own", "lengths", "step", "constants")


@cache
def _kernel(name: str) -> Any:
    inputs, outputs, source = {
        "attend": (
            [*("qkv", "scales", "cosines", "sines", "prompt_keys", "prompt_values"), *_PLACES],
            ["out", "parts"],
            _ATTEND,
        ),
        "join": (["mixed", "parts"], ["out"], _JOIN),
        "gate": (["both"], ["out"], _GATE),
        "draw": (["logits", "uniforms", "constants"], ["ids", "log_probs"], _DRAW),
    }[name]
    return mx.fast.cuda_kernel(name=f"troupe_{name}", input_names=inputs, output_names=outputs, source=source)


def are_here() -> bool:
    """Whether these kernels can be used: MLX computes on an NVIDIA card."""
    return mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)


def serve(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether `attend` knows heads of this kind, here: a warp each for a group's queries, key and value, and what all
    warps share of the queries in 48 KiB."""
    group = heads // kv_heads
    return are_here() and head_dim % 64 == 0 and head_dim <= 256 and group <= 6 and group * head_dim <= _LARGEST_GROUP


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
    context: int,
) -> mx.array:
    """The new token of every row: projections (B, (H + 2·K)·d) → attention (B, H·d).

    Writes the token's key and value into place `step` of `own`, which is against MLX's custom: an update of its own
    would copy all of `own` whenever an earlier step is still being computed. So `own` must be evaluated, contiguous and
    known to nobody else; and the next token's call sees what this one wrote because it depends on its result.

    `scales` (H + K, d) of the norms of queries and keys; `turn`: cosines and sines (S, d/2) of its position in float32;
    `prompts`: keys and values (S, K, P, d); `own` (B, 2·K, N, d): keys before values, of which the first `step` (1,)
    int32 places are taken; `lengths` (S,) int32 of the prompts; `constants` float32: (norms' ε, scale of the scores).
    `context`: tokens that the longest row sees, by which the work is split.
    """
    (B, wide), (_, K, _, d) = qkv.shape, prompts[0].shape
    H = wide // d - 2 * K
    splits = max(1, min(_BLOCKS_WANTED // (B * K), context // _LEAST_SPLIT))
    kind = qkv.dtype if splits == 1 else mx.float32
    template = [("T", qkv.dtype), ("O", kind), ("HEADS", H), ("KV", K), ("R", H // K), ("SIZE", d)]
    out, parts = _kernel("attend")(
        inputs=[qkv, scales, *turn, *prompts, own, lengths, step, constants],
        template=[*template, ("WHOLE", splits == 1)],
        grid=(B * K * splits * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(B * H, splits, d), (B * H, splits, 2)],
        output_dtypes=[kind, mx.float32],
    )
    if splits > 1:
        (out,) = _kernel("join")(
            inputs=[out, parts],
            template=[("T", qkv.dtype), ("SIZE", d)],
            grid=(-(-B * H * 32 // _THREADS) * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(B * H, d)],
            output_dtypes=[qkv.dtype],
        )
    attended: mx.array = out.reshape(B, H * d)
    return attended


def draw(logits: mx.array, uniforms: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Logits (B, V), uniforms (B,) in [0, 1) → ids (B,) of softmax(logits / temperature) by its inverse distribution
    function, and their log-probs in nats."""
    B = logits.shape[0]
    ids, log_probs = _kernel("draw")(
        inputs=[logits, uniforms, mx.array([1.0 / temperature])],
        template=[("T", logits.dtype)],
        grid=(B * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(B,), (B,)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return ids, log_probs


def gate(both: mx.array) -> mx.array:
    """Gate beside up (B, 2·F) → gate · σ(gate) · up (B, F)."""
    B, F = both.shape[0], both.shape[1] // 2
    gated: mx.array
    (gated,) = _kernel("gate")(
        inputs=[both],
        template=[("T", both.dtype)],
        grid=(-(-B * F // _THREADS) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(B, F)],
        output_dtypes=[both.dtype],
    )
    return gated
