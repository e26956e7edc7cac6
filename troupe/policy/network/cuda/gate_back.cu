// The cotangents of gate and up, behind each other in a row of 2·F, from that of gate·σ(gate)·up: a thread E numbers.
constexpr int E = 16 / sizeof(T);
struct alignas(16) Some { T v[E]; };
const int F = gate_shape[1], pieces = F / E;
const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x, row = i / pieces, column = i % pieces * E;
if (row >= gate_shape[0]) return;
const Some g = *reinterpret_cast<const Some*>(gate + row * gate_strides[0] + column);
const Some u = *reinterpret_cast<const Some*>(up + row * up_strides[0] + column);
const Some c = *reinterpret_cast<const Some*>(z_grad + row * z_grad_strides[0] + column);
Some of_gate, of_up;
#pragma unroll
for (int j = 0; j < E; j++) {
    const float a = static_cast<float>(g.v[j]), b = static_cast<float>(u.v[j]), grad = static_cast<float>(c.v[j]);
    const float s = 1.0f / (1.0f + expf(-a));
    of_gate.v[j] = static_cast<T>(grad * b * s * (1.0f + a * (1.0f - s)));
    of_up.v[j] = static_cast<T>(grad * a * s);
}
*reinterpret_cast<Some*>(grads + row * 2 * F + column) = of_gate;
*reinterpret_cast<Some*>(grads + row * 2 * F + F + column) = of_up;
