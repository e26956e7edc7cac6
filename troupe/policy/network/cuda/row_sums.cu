// Of a row of logits, in a block: the peak of them times `scale`, Σ e^z and Σ e^z·z of what is below it, z ≤ 0.
__shared__ float parts[3 * 8];
const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = logits_shape[1];
const T* row = logits + int64_t(blockIdx.x) * columns;
const float factor = scale[0];
float peak = -__int_as_float(0x7f800000);
for (int i = threadIdx.x; i < columns; i += 256) peak = fmaxf(peak, static_cast<float>(row[i]) * factor);
for (int reach = 16; reach > 0; reach /= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, reach));
if (lane == 0) parts[warp] = peak;
__syncthreads();
for (int w = 0; w < 8; w++) peak = fmaxf(peak, parts[w]);
float power_sum = 0.0f, weighted_sum = 0.0f;
for (int i = threadIdx.x; i < columns; i += 256) {
    const float z = static_cast<float>(row[i]) * factor - peak, power = expf(z);
    power_sum += power;
    weighted_sum += power * z;
}
for (int reach = 16; reach > 0; reach /= 2) {
    power_sum += __shfl_xor_sync(0xffffffffu, power_sum, reach);
    weighted_sum += __shfl_xor_sync(0xffffffffu, weighted_sum, reach);
}
if (lane == 0) {
    parts[8 + warp] = power_sum;
    parts[16 + warp] = weighted_sum;
}
__syncthreads();
if (threadIdx.x == 0) {
    power_sum = weighted_sum = 0.0f;
    for (int w = 0; w < 8; w++) {
        power_sum += parts[8 + w];
        weighted_sum += parts[16 + w];
    }
    sums[3 * int64_t(blockIdx.x)] = peak;
    sums[3 * int64_t(blockIdx.x) + 1] = power_sum;
    sums[3 * int64_t(blockIdx.x) + 2] = weighted_sum;
}
