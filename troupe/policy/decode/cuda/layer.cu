// The body of a kernel that MLX makes a function of; shapes, types and names are told in cuda_kernels.py.
// A layer, all blocks together: x → projections → attention → behind it → inside of the MLP → behind that. What a block
// needs of others it finds in memory once the grid has met; the weights that come next are on their way by then.
extern __shared__ __align__(16) char memory[];
constexpr int PROJECTED = (HEADS + 2 * KV) * SIZE, MIXED = HEADS * SIZE;
using Products = ProductShared<T, ROWS, WARPS>;
using Sum = UnitSum<T, ROWS, WARPS>;
using Attention = AttendShared<T, HEADS / KV, SIZE, WARPS>;
Products& products = *reinterpret_cast<Products*>(memory);
const int rows = x_shape[0], D = x_shape[1], F = down_shape[1];
const float epsilon = constants[0];
const Turn turn(rows, ROWS);
unsigned* met = const_cast<unsigned*>(counter);
const T* unscaled = nullptr;
auto qkv_row = [&](int unit, int i) { return qkv_weight + (size_t(unit) * 8 + i) * D; };
auto o_row = [&](int unit, int i) { return o_weight + (size_t(unit) * 8 + i) * MIXED; };
auto inside_row = [&](int unit, int i) { return gate_up + (size_t(unit / 2) * 8 + i + size_t(unit % 2) * F) * D; };
auto down_row = [&](int unit, int i) { return down + (size_t(unit) * 8 + i) * F; };

multiply_units<1, 4, 1>(x, D, turn, input_scale, epsilon, PROJECTED / 8, qkv_row,
    [&](int unit, int row, int i, const Sum& sum) { qkv[size_t(row) * PROJECTED + unit * 8 + i] = T(sum(0)); },
    static_cast<unsigned*>(nullptr), products);
prefetch_units<1>(MIXED, sizeof(T), D / 8, turn, o_row);
grid_sync(met, gridDim.x);

prefetch_units<2>(D, sizeof(T), F / 4, turn, inside_row);
prefetch_units<1>(F, sizeof(T), D / 8, turn, down_row);
const int slots = prompt_keys_shape[0], width = rows / slots, together = int(constants[2]);
const AttendInputs<T, SCALES> given{
    qkv, scales, cosines, sines, prompt_keys, prompt_values, const_cast<T*>(own), lengths,
    epsilon, constants[1] * 1.44269504f, step[0], width, together, prompt_keys_shape[2], own_shape[2]};
const int items = slots * KV * ((width + together - 1) / together);
for (int item = blockIdx.x; item < items; item += gridDim.x) {
    attend_rows<T, T, HEADS, KV, SIZE, NORM, WINDOW, true, WARPS>(
        given, item, 0, 1, *reinterpret_cast<Attention*>(memory), mixed, static_cast<float*>(nullptr));
    __syncthreads();
}

multiply_units<1, 2, 3>(mixed, MIXED, turn, unscaled, epsilon, D / 8, o_row,
    [&](int unit, int row, int i, const Sum& sum) {
        const size_t place = size_t(row) * D + unit * 8 + i;
        middle[place] = T(float(x[place]) + float(T(sum(0))));
    }, met, products);
multiply_units<2, 4, 1>(middle, D, turn, mlp_scale, epsilon, F / 4, inside_row,
    [&](int unit, int row, int i, const Sum& sum) {
        const float gate = float(T(sum(0))), up = float(T(sum(1)));
        inside[size_t(row) * F + unit / 2 * 8 + i] = T(gate / (1.f + __expf(-gate)) * up);
    }, met, products);
multiply_units<1, 2, 3>(inside, F, turn, unscaled, epsilon, D / 8, down_row,
    [&](int unit, int row, int i, const Sum& sum) {
        const size_t place = size_t(row) * D + unit * 8 + i;
        out[place] = T(float(middle[place]) + float(T(sum(0))));
    }, met, products);
