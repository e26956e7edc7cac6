// The body of a kernel that MLX makes a function of; shapes, types and names are told in cuda_kernels.py.
// A block for up to 16 / R rows of one prompt and a key/value head, or for a part of what they see.
extern __shared__ __align__(16) char memory[];
using Shared = AttendShared<T, HEADS / KV, SIZE, WARPS>;
const AttendInputs<T, SCALES> given{
    qkv, scales, cosines, sines, prompt_keys, prompt_values, const_cast<T*>(own), lengths,
    constants[0], constants[1] * 1.44269504f, step[0], qkv_shape[0] / prompt_keys_shape[0],
    int(constants[2]), prompt_keys_shape[2], own_shape[2]};
attend_rows<T, O, HEADS, KV, SIZE, NORM, WINDOW, WHOLE, WARPS>(
    given, blockIdx.x, blockIdx.y, gridDim.y, *reinterpret_cast<Shared*>(memory), out, parts);
