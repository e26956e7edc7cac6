// The body of a kernel that MLX makes a function of; shapes, types and names are told in cuda_kernels.py.
const size_t place = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
const size_t wide = both_shape[1] / 2, row = place / wide, column = place % wide;
if (row >= both_shape[0]) return;
const float gate = float(both[row * 2 * wide + column]), up = float(both[row * 2 * wide + wide + column]);
out[place] = T(gate / (1.f + __expf(-gate)) * up);
