// The beginning of a kernel that MLX makes a function of, draw_filtered.cu the rest; shapes, types and names are told in
// cuda_sampling.py.
// One block a row, a stretch of the vocabulary a warp. A row's numbers x / temperature, bias and penalties included, lie
// in `scaled`, in quads, so that rows are aligned. All filters but the last keep the likeliest, of equal ones those of
// lower ids; so what is kept is told by one number and one id, the cut. Shares are added up as whole numbers, whose sums
// have no order.
using Sum = unsigned long long;
constexpr int WARPS = THREADS / 32, BINS = 2048, ROOM = 4096, FEW = 1024;
constexpr float BINS_PER_NAT = 64.f;
struct alignas(4 * sizeof(T)) Four { T of[4]; };
struct Selected { unsigned key; Sum target, above, with; };

__shared__ unsigned low[BINS], high[BINS], members[ROOM];
__shared__ Sum parts[2][32];
__shared__ alignas(16) float few[FEW];
__shared__ int few_ids[FEW];
__shared__ float mosts[32], sums[32];
__shared__ unsigned count, crossed;
__shared__ Sum crossed_before;

const int row = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
const int W = recent_shape[1];
int V = logits_shape[1], quads = (V + 3) / 4;
int stretch = (quads + WARPS - 1) / WARPS, begin = warp * stretch, end = min(quads, begin + stretch);
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
