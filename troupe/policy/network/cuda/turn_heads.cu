// Heads normalized and turned by their positions: a warp a head of a token, a lane E numbers of either half.
constexpr int HALF = SIZE / 2, E = HALF / 32;
struct alignas(E * sizeof(T)) Some { T v[E]; };
struct alignas(E * sizeof(float)) Floats { float v[E]; };
const int lane = threadIdx.x % 32, heads = x_shape[2];
const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
if (row >= int64_t(x_shape[1]) * heads) return;
const int64_t token = row / heads, head = row % heads;
const T* from = x + token * x_strides[1] + head * x_strides[2] + lane * E;
Some low = *reinterpret_cast<const Some*>(from), high = *reinterpret_cast<const Some*>(from + HALF);
if (NORMALIZED) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < E; i++) {
        const float a = static_cast<float>(low.v[i]), b = static_cast<float>(high.v[i]);
        squares += a * a + b * b;
    }
#pragma unroll
    for (int reach = 16; reach > 0; reach /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, reach);
    const float root = rsqrtf(squares / SIZE + eps[0]);
#pragma unroll
    for (int i = 0; i < E; i++) {
        low.v[i] = static_cast<T>(static_cast<float>(scale[lane * E + i]) * (static_cast<float>(low.v[i]) * root));
        high.v[i] = static_cast<T>(static_cast<float>(scale[HALF + lane * E + i]) * (static_cast<float>(high.v[i]) * root));
    }
}
const Floats c = *reinterpret_cast<const Floats*>(cosines + token * HALF + lane * E);
const Floats s = *reinterpret_cast<const Floats*>(sines + token * HALF + lane * E);
Some to_low, to_high;
#pragma unroll
for (int i = 0; i < E; i++) {
    const float a = static_cast<float>(low.v[i]), b = static_cast<float>(high.v[i]);
    to_low.v[i] = static_cast<T>(a * c.v[i] - b * s.v[i]);
    to_high.v[i] = static_cast<T>(a * s.v[i] + b * c.v[i]);
}
*reinterpret_cast<Some*>(y + row * SIZE + lane * E) = to_low;
*reinterpret_cast<Some*>(y + row * SIZE + HALF + lane * E) = to_high;
