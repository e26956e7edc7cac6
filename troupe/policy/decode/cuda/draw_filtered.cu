// The body of a kernel that MLX makes a function of; shapes, types and names are told in cuda_sampling.py.
// One block a row, a stretch of the vocabulary a warp. A row's numbers x / temperature, bias and penalties included, lie
// in `scaled`, in quads, so that rows are aligned. All filters but the last keep the likeliest, of equal ones those of
// lower ids; so what is kept is told by one number and one id, the cut. Shares are added up as whole numbers, whose sums
// have no order.
using Sum = unsigned long long;
constexpr int WARPS = THREADS / 32, BINS = 2048, ROOM = 4096;
constexpr float BINS_PER_NAT = 64.f;
struct alignas(4 * sizeof(T)) Four { T of[4]; };
struct Selected { unsigned key; Sum target, above, with; };

__shared__ unsigned low[BINS], high[BINS], members[ROOM];
__shared__ Sum parts[2][32];
__shared__ float mosts[32], sums[32];
__shared__ unsigned count, crossed;
__shared__ Sum crossed_before;

const int row = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
const int V = logits_shape[1], quads = (V + 3) / 4, W = recent_shape[1];
const int stretch = (quads + WARPS - 1) / WARPS, begin = warp * stretch, end = min(quads, begin + stretch);
const T* given = logits + size_t(row) * V;
float* mine = scaled + size_t(row) * quads * 4;
const float ENDLESS = __uint_as_float(0x7f800000u), temperature = numbers[0];
int turn = 0;

auto joined = [&](Sum x, bool adds) {  // sum, or largest, of all threads, for all
    for (int far = 16; far > 0; far /= 2) {
        const Sum other = __shfl_xor_sync(0xffffffff, x, far);
        x = adds ? x + other : max(x, other);
    }
    turn ^= 1;
    if (lane == 0) parts[turn][warp] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < WARPS; w++) x = adds ? x + parts[turn][w] : max(x, parts[turn][w]);
    return x;
};
auto sum_of = [&](Sum x) { return joined(x, true); };
auto largest_of = [&](unsigned x) { return unsigned(joined(x, false)); };
auto least_of = [&](unsigned x) { return ~largest_of(~x); };
auto key_of = [](float v) {  // ordered as the numbers are
    const unsigned bits = __float_as_uint(v);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
};
auto value_of = [](unsigned key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); };
auto add = [](float x, float& most, float& sum) {
    if (x > most) { sum = sum * expf(most - x) + 1.f; most = x; }
    else sum += expf(x - most);
};
auto join_all = [&](float& most, float& sum) {
    for (int far = 16; far > 0; far /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, most, far), more = __shfl_xor_sync(0xffffffff, sum, far);
        const float both = fmaxf(most, other);
        sum = sum * expf(most - both) + more * expf(other - both);
        most = both;
    }
    if (lane == 0) { mosts[warp] = most; sums[warp] = sum; }
    __syncthreads();
    most = mosts[0];
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, mosts[w]);
    sum = 0.f;
    for (int w = 0; w < WARPS; w++) sum += sums[w] * expf(mosts[w] - most);
    __syncthreads();
};

// The model's own distribution, whose log-probability is wanted too.
const bool is_adjusting = counts[2] != 0, is_aligned = V % 4 == 0 && reinterpret_cast<size_t>(given) % sizeof(Four) == 0;
float most = -1e30f, sum = 0.f;
#pragma unroll 2
for (int q = begin + lane; q < end; q += 32) {
    float x[4];
    if (is_aligned) {
        const Four four = reinterpret_cast<const Four*>(given)[q];
        for (int j = 0; j < 4; j++) x[j] = float(four.of[j]);
    } else {
        for (int j = 0; j < 4; j++) x[j] = 4 * q + j < V ? float(given[4 * q + j]) : -ENDLESS;
    }
    float4 divided = make_float4(x[0] / temperature, x[1] / temperature, x[2] / temperature, x[3] / temperature);
    add(divided.x, most, sum);
    add(divided.y, most, sum);
    add(divided.z, most, sum);
    add(divided.w, most, sum);
    reinterpret_cast<float4*>(mine)[q] = is_adjusting ? make_float4(x[0], x[1], x[2], x[3]) : divided;
}
join_all(most, sum);
const float plain_shift = most + logf(sum);
float shift = plain_shift, top = most - shift;  // log-probs are scaled numbers less the shift

if (is_adjusting) {
    for (int j = thread; j < bias_ids_shape[0]; j += THREADS)
        if (bias_ids[j] >= 0 && bias_ids[j] < V) mine[bias_ids[j]] += bias[j];
    __syncthreads();
    const int* ids_before = recent + size_t(row) * W;
    for (int j = thread; j < W; j += THREADS) {
        const int id = ids_before[j];
        bool first = id >= 0 && id < V, repeated = false, present = false;
        int times = 0;
        for (int i = 0; i < j; i++) first = first && ids_before[i] != id;
        if (!first) continue;
        for (int i = j; i < W; i++) {
            const bool same = ids_before[i] == id;
            repeated = repeated || (same && W - i <= counts[3]);
            present = present || (same && W - i <= counts[4]);
            times += same && W - i <= counts[5];
        }
        float x = mine[id];
        if (repeated) x = x < 0.f ? __fmul_rn(x, numbers[5]) : x / numbers[5];
        if (present) x -= numbers[6];
        for (int i = 0; i < times; i++) x -= numbers[7];
        mine[id] = x;
    }
    __syncthreads();
    most = -1e30f, sum = 0.f;
    #pragma unroll 2
    for (int q = begin + lane; q < end; q += 32) {
        float4 x = reinterpret_cast<float4*>(mine)[q];
        x = make_float4(x.x / temperature, x.y / temperature, x.z / temperature, x.w / temperature);
        add(x.x, most, sum);
        add(x.y, most, sum);
        add(x.z, most, sum);
        add(x.w, most, sum);
        reinterpret_cast<float4*>(mine)[q] = x;
    }
    join_all(most, sum);
    shift = most + logf(sum), top = most - shift;
}
__syncthreads();

unsigned cut = 0;
int last = V;  // of those at the cut
auto is_kept = [&](unsigned key, int i) { return i < V && (key > cut || (key == cut && i <= last)); };
auto load = [&](int q, float (&v)[8]) {  // log-probs of quads q and, where the warp has it, q + 32
    const float4* from = reinterpret_cast<const float4*>(mine);
    const float4 x = from[q], y = from[q + 32 < end ? q + 32 : q];
    v[0] = x.x - shift, v[1] = x.y - shift, v[2] = x.z - shift, v[3] = x.w - shift;
    v[4] = y.x - shift, v[5] = y.y - shift, v[6] = y.z - shift, v[7] = y.w - shift;
};
auto id_of = [&](int q, int j) { return j < 4 ? 4 * q + j : q + 32 < end ? 4 * q + 124 + j : V; };
auto share = [](float v) { return Sum(__float2ull_rn(expf(v) * 4611686018427387904.f)); };  // in units of 2^-62
auto bin_of = [](float v) { return int(fminf(fmaxf(-v * BINS_PER_NAT, 0.f), float(BINS - 1))); };

// Of what is kept, the largest key for which those at least as likely are `wanted`, or have so much of all shares.
auto select = [&](bool by_share, Sum wanted, float part) {
    auto weight = [&](float v) { return by_share ? share(v) : Sum(1); };
    for (int b = thread; b < BINS; b += THREADS) low[b] = high[b] = 0;
    if (thread == 0) count = 0;
    __syncthreads();
    Sum weights = 0;  // first the bin it lies in
    for (int q = begin + lane; q < end; q += 64) {
        float v[8];
        load(q, v);
        for (int j = 0; j < 8; j++) {
            if (!is_kept(key_of(v[j]), id_of(q, j))) continue;
            const Sum w = weight(v[j]);
            weights += w;
            const int b = bin_of(v[j]);
            if (b == BINS - 1 || w == 0) continue;  // the last bin is what the others leave, as many as there may be
            const unsigned little = unsigned(w), before = atomicAdd(&low[b], little);
            const unsigned much = unsigned(w >> 32) + (before + little < little ? 1u : 0u);
            if (much) atomicAdd(&high[b], much);
        }
    }
    Selected found;
    const Sum all = sum_of(weights);
    found.target = by_share ? max(Sum(1), Sum(double(part) * double(all))) : min(wanted, all);
    constexpr int OWN = BINS / THREADS;
    Sum own = 0;
    for (int b = thread * OWN; b < thread * OWN + OWN; b++) own += Sum(high[b]) << 32 | low[b];
    Sum upto = own;
    for (int far = 1; far < 32; far *= 2) {
        const Sum left = __shfl_up_sync(0xffffffff, upto, far);
        if (lane >= far) upto += left;
    }
    turn ^= 1;
    if (lane == 31) parts[turn][warp] = upto;
    __syncthreads();
    Sum before = upto - own, binned = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += parts[turn][w];
        binned += parts[turn][w];
    }
    for (int b = thread * OWN; b < thread * OWN + OWN; b++) {
        const Sum with = before + (Sum(high[b]) << 32 | low[b]);
        if (before < found.target && found.target <= with) { crossed = b; crossed_before = before; }
        before = with;
    }
    __syncthreads();
    const bool is_last = found.target > binned;
    const int bin = is_last ? BINS - 1 : int(crossed);
    const Sum likelier = is_last ? binned : crossed_before;
    unsigned low_end = ~0u, high_end = 0;  // then, among its members, by halves
    for (int q = begin + lane; q < end; q += 64) {
        float v[8];
        load(q, v);
        for (int j = 0; j < 8; j++) {
            const unsigned key = key_of(v[j]);
            if (bin_of(v[j]) != bin || !is_kept(key, id_of(q, j))) continue;
            const unsigned place = atomicAdd(&count, 1u);
            if (place < ROOM) members[place] = key;
            low_end = min(low_end, key);
            high_end = max(high_end, key);
        }
    }
    low_end = least_of(low_end), high_end = largest_of(high_end);
    const unsigned n = count;
    auto at_least = [&](unsigned key) {
        Sum some = 0;
        if (n <= ROOM) {
            for (unsigned m = thread; m < n; m += THREADS)
                if (members[m] >= key) some += weight(value_of(members[m]));
        } else {
            for (int q = begin + lane; q < end; q += 64) {
                float v[8];
                load(q, v);
                for (int j = 0; j < 8; j++) {
                    const unsigned other = key_of(v[j]);
                    if (bin_of(v[j]) == bin && other >= key && is_kept(other, id_of(q, j))) some += weight(v[j]);
                }
            }
        }
        return likelier + sum_of(some);
    };
    while (low_end < high_end) {
        const unsigned middle = high_end - (high_end - low_end) / 2;
        if (at_least(middle) >= found.target) low_end = middle;
        else high_end = middle - 1;
    }
    found.key = low_end;
    found.with = by_share ? 0 : at_least(low_end);
    found.above = by_share ? 0 : at_least(low_end + 1);
    __syncthreads();
    return found;
};

float bound = ENDLESS;  // of shares: likelier ones are excluded, but those that are spared
auto is_left = [&](float v, int i) {
    if (!is_kept(key_of(v), i)) return false;
    if (bound == ENDLESS || !(expf(v) > bound)) return true;
    for (int s = 0; s < spared_shape[0]; s++)
        if (spared[s] == i) return true;
    return false;
};

// The first id with which weights, added up by id, are above a target: for a draw, shares in units of 2^-44 of the
// likeliest, above this part of them all; else how many are kept at the key, above `target`.
auto locate = [&](bool draws, float part, unsigned key, Sum target, Sum& total) {
    auto weight = [&](float v, int i) {
        if (draws) return is_left(v, i) ? Sum(__float2ull_rn(expf(v - top) * 17592186044416.f)) : Sum(0);
        return Sum(key_of(v) == key && is_kept(key, i));
    };
    const float4* from = reinterpret_cast<const float4*>(mine);
    int first = 0, n = quads;
    Sum before = 0;
    for (bool is_whole = true; is_whole || n > 1; is_whole = false) {
        const int size = (n + WARPS - 1) / WARPS, stop = first + min(n, (warp + 1) * size);
        Sum weights = 0;
        #pragma unroll 2
        for (int q = first + warp * size + lane; q < stop; q += 32) {
            const float4 x = from[q];
            weights += weight(x.x - shift, 4 * q) + weight(x.y - shift, 4 * q + 1);
            weights += weight(x.z - shift, 4 * q + 2) + weight(x.w - shift, 4 * q + 3);
        }
        const Sum all = sum_of(weights);
        if (is_whole) {
            total = all;
            if (draws) target = Sum(double(part) * double(all));
        }
        int w = 0;
        while (w < WARPS - 1 && before + parts[turn][w] <= target) before += parts[turn][w++];
        first = min(first + w * size, quads - 1);
        n = min(size, n - w * size);
    }
    for (int i = 4 * first; i < 4 * first + 4; i++) {
        before += weight(mine[i] - shift, i);
        if (before > target) return i;
    }
    return min(4 * first + 3, V - 1);
};

// The cut that keeps the `n` likeliest of what is kept.
auto cut_of_likeliest = [&](int n, unsigned& key, int& id) {
    const Selected found = select(false, n, 0.f);
    key = found.key, id = key == cut ? last : V;
    if (found.with == found.target) return;
    Sum tied;
    id = locate(false, 0.f, key, found.target - found.above - 1, tied);
};

if (counts[0] > 0 && counts[0] < V) {
    unsigned key;
    int id;
    cut_of_likeliest(counts[0], key, id);
    cut = key, last = id;
}
if (numbers[1] < 1.f) {
    const Selected found = select(true, 0, numbers[1]);
    if (found.key > cut) cut = found.key, last = V;
}
if (numbers[2] > -1e30f) {
    unsigned least = 0, most_key = key_of(top);  // the least key that is near enough to the largest
    while (least < most_key) {
        const unsigned middle = least + (most_key - least) / 2;
        if (value_of(middle) - top >= numbers[2]) most_key = middle;
        else least = middle + 1;
    }
    int id = V;
    if (counts[1] > 1 && least > cut) {
        unsigned key;
        cut_of_likeliest(counts[1], key, id);
        if (key < least) least = key;
        else id = V;  // what is near enough stays, whatever its id
    }
    if (least > cut || (least == cut && id < last)) cut = least, last = id;
}

// Top choices are excluded: those above a share, but the least likely of them and what is spared.
if (numbers[3] >= 1.f || filter_uniforms[row] < numbers[3]) {
    Sum kept = 0;
    for (int q = begin + lane; q < end; q += 64) {
        float v[8];
        load(q, v);
        for (int j = 0; j < 8; j++)
            if (is_kept(key_of(v[j]), id_of(q, j))) kept += share(v[j]);
    }
    const float limit = numbers[4] * (__ull2float_rn(sum_of(kept)) / 4611686018427387904.f);
    unsigned least = __float_as_uint(ENDLESS), largest = 0;  // numbers from 0 on are ordered as their bits
    for (int q = begin + lane; q < end; q += 64) {
        float v[8];
        load(q, v);
        for (int j = 0; j < 8; j++)
            if (is_kept(key_of(v[j]), id_of(q, j)) && expf(v[j]) > limit) least = min(least, __float_as_uint(expf(v[j])));
    }
    bound = __uint_as_float(least_of(least));
    for (int q = begin + lane; q < end; q += 64) {
        float v[8];
        load(q, v);
        for (int j = 0; j < 8; j++)
            if (is_left(v[j], id_of(q, j))) largest = max(largest, key_of(v[j]));
    }
    top = value_of(largest_of(largest));
}
Sum total;
const int id = locate(true, fminf(uniforms[row], 0.99999994f), 0, 0, total);
if (thread == 0) {
    ids[row] = unsigned(id);
    log_probs[row] = float(given[id]) / temperature - plain_shift;
    sampled[row] = mine[id] - shift - top - logf(__ull2float_rn(total) / 17592186044416.f);
}
