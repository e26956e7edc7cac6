// The body of a kernel that MLX makes a function of; shapes, types and names are told in cuda_kernels.py.
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
