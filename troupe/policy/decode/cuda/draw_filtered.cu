// What follows adjust.cu: the filters, in their order, and the draw.
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

bool is_narrow = false;
float bound = ENDLESS;  // of shares: likelier ones are excluded, but those that are spared
auto is_left = [&](float v, int i) {
    if (!is_kept(key_of(v), i)) return false;
    if (bound == ENDLESS || !(expf(v) > bound)) return true;
    for (int s = 0; s < spared_shape[0]; s++)
        if (spared[s] == (is_narrow ? few_ids[i] : i)) return true;
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
        first = max(0, min(first + w * size, quads - 1));
        n = min(size, n - w * size);
    }
    for (int i = 4 * first; i < 4 * first + 4; i++) {
        before += weight(mine[i] - shift, i);
        if (before > target) return i;
    }
    return max(0, min(4 * first + 3, V - 1));
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
    if (counts[0] <= FEW) {  // from here on these few alone, in the order of their ids, at places 0, 1, …
        if (thread == 0) count = 0;
        __syncthreads();
        for (int q = begin + lane; q < end; q += 64) {
            float v[8];
            load(q, v);
            for (int j = 0; j < 8; j++)
                if (is_kept(key_of(v[j]), id_of(q, j))) members[min(atomicAdd(&count, 1u), FEW - 1u)] = id_of(q, j);
        }
        for (int m = thread; m < FEW; m += THREADS) few[m] = -ENDLESS, few_ids[m] = 0;
        __syncthreads();
        V = min(count, unsigned(FEW)), quads = (V + 3) / 4;
        for (int m = thread; m < V; m += THREADS) {
            int place = 0;
            for (int other = 0; other < V; other++) place += members[other] < members[m];
            few[place] = mine[members[m]], few_ids[place] = members[m];
        }
        __syncthreads();
        mine = few, is_narrow = true, cut = 0, last = V;
        stretch = (quads + WARPS - 1) / WARPS, begin = warp * stretch, end = min(quads, begin + stretch);
    }
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
    const int drawn = max(0, is_narrow ? few_ids[id] : id);
    ids[row] = unsigned(drawn);
    log_probs[row] = float(given[drawn]) / temperature - plain_shift;
    sampled[row] = mine[id] - shift - top - logf(__ull2float_rn(total) / 17592186044416.f);
}
