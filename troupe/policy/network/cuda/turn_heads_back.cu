// The way back through turn_heads: cotangents of the heads, and for each block what its tokens add to that of the scale.
// Blocks are as many on every card, and a warp's heads follow each other in the same order, so sums are the same.
constexpr int HALF = SIZE / 2, E = HALF / 32;
struct alignas(E * sizeof(T)) Some { T v[E]; };
struct alignas(E * sizeof(float)) Floats { float v[E]; };
__shared__ float sums[8 * SIZE];
const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, heads = x_shape[2];
const int64_t rows = int64_t(x_shape[1]) * heads;
float weights[2 * E], total[2 * E];
#pragma unroll
for (int i = 0; i < E; i++) {
    weights[i] = NORMALIZED ? static_cast<float>(scale[lane * E + i]) : 1.0f;
    weights[E + i] = NORMALIZED ? static_cast<float>(scale[HALF + lane * E + i]) : 1.0f;
    total[i] = total[E + i] = 0.0f;
}
for (int64_t row = int64_t(blockIdx.x) * 8 + warp; row < rows; row += int64_t(gridDim.x) * 8) {
    const int64_t token = row / heads, head = row % heads;
    const T* of = y_grad + token * y_grad_strides[1] + head * y_grad_strides[2] + lane * E;
    const Some low = *reinterpret_cast<const Some*>(of), high = *reinterpret_cast<const Some*>(of + HALF);
    const Floats c = *reinterpret_cast<const Floats*>(cosines + token * HALF + lane * E);
    const Floats s = *reinterpret_cast<const Floats*>(sines + token * HALF + lane * E);
    float grad[2 * E];
#pragma unroll
    for (int i = 0; i < E; i++) {
        const float a = static_cast<float>(low.v[i]), b = static_cast<float>(high.v[i]);
        grad[i] = a * c.v[i] + b * s.v[i];
        grad[E + i] = b * c.v[i] - a * s.v[i];
    }
    if (NORMALIZED) {
        const T* from = x + token * x_strides[1] + head * x_strides[2] + lane * E;
        const Some first = *reinterpret_cast<const Some*>(from), second = *reinterpret_cast<const Some*>(from + HALF);
        float number[2 * E], squares = 0.0f, along = 0.0f;
#pragma unroll
        for (int i = 0; i < E; i++) {
            number[i] = static_cast<float>(first.v[i]);
            number[E + i] = static_cast<float>(second.v[i]);
        }
#pragma unroll
        for (int i = 0; i < 2 * E; i++) {
            squares += number[i] * number[i];
            along += number[i] * grad[i] * weights[i];
        }
#pragma unroll
        for (int reach = 16; reach > 0; reach /= 2) {
            squares += __shfl_xor_sync(0xffffffffu, squares, reach);
            along += __shfl_xor_sync(0xffffffffu, along, reach);
        }
        const float root = rsqrtf(squares / SIZE + eps[0]), share = along * root * root / SIZE;
#pragma unroll
        for (int i = 0; i < 2 * E; i++) {
            total[i] += grad[i] * (number[i] * root);
            grad[i] = root * (grad[i] * weights[i] - number[i] * share);
        }
    }
    Some to_low, to_high;
#pragma unroll
    for (int i = 0; i < E; i++) {
        to_low.v[i] = static_cast<T>(grad[i]);
        to_high.v[i] = static_cast<T>(grad[E + i]);
    }
    *reinterpret_cast<Some*>(x_grad + row * SIZE + lane * E) = to_low;
    *reinterpret_cast<Some*>(x_grad + row * SIZE + HALF + lane * E) = to_high;
}
#pragma unroll
for (int i = 0; i < E; i++) {
    sums[warp * SIZE + lane * E + i] = total[i];
    sums[warp * SIZE + HALF + lane * E + i] = total[E + i];
}
__syncthreads();
for (int i = threadIdx.x; i < SIZE; i += 256) {
    float sum = 0.0f;
    for (int w = 0; w < 8; w++) sum += sums[w * SIZE + i];
    scale_grads[int64_t(blockIdx.x) * SIZE + i] = sum;
}
