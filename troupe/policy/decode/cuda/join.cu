// The body of a kernel that MLX makes a function of; shapes, types and names are told in cuda_kernels.py.
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
