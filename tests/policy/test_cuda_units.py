"""The kernels' vocabulary (`policy/cuda/units.cuh`), by its twin on a CPU: what tests of kernels rest on."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import troupe.policy
from tests.support.emulated_cuda import EmulatedKernel

pytestmark = pytest.mark.slow  # each source is compiled

_PRODUCT = """
__shared__ alignas(16) T tile[16][24], narrow[16][8];
const int lane = threadIdx.x;
for (int i = lane; i < 32; i += 32) copy16_async(&tile[i / 2][i % 2 * 8], a + 8 * i, true);
for (int i = lane; i < 16; i += 32) copy16_async(&narrow[i][0], b + 8 * i, i < rows[0]);
copies_commit();
if (WAITS) copies_wait<0>();
__syncthreads();
unsigned r[4], q[4];
load4<false>(r, &tile[lane % 8 + lane / 8 % 2 * 8][lane / 16 * 8]);
load4<true>(q, &narrow[lane % 16][0]);
float c[4] = {0.f, 0.f, 0.f, 0.f};
multiply<T>(c, r, q[0], q[1]);
for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
"""

_MEETING = """
__shared__ float mine;
if (threadIdx.x == 0) mine = float(blockIdx.x + 1);
if (threadIdx.x == 0) given[blockIdx.x] = mine;
grid_sync(const_cast<uint32_t*>(counter), gridDim.x);
float sum = 0.f;
for (int i = threadIdx.x; i < gridDim.x; i += 32) sum += given[i];
for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(0xffffffff, sum, far);
if (MISSES && threadIdx.x > 8) return;
if (MISSES) __syncthreads(), __shfl_xor_sync(0xffffffff, sum, 1);
if (MISSES && threadIdx.x == 3) grid_sync(const_cast<uint32_t*>(counter), gridDim.x + 1);
if (threadIdx.x == 0) sums[blockIdx.x] = sum * mine;
"""


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_product_of_tiles(dtype: mx.Dtype) -> None:
    a, b = (mx.random.normal((16, n), key=mx.random.key(n)).astype(dtype) for n in (16, 8))
    found = _product(a, b, dtype, waits=True)
    a, b = (x.astype(mx.float32) for x in (a, mx.where(mx.arange(16)[:, None] < 11, b, 0)))
    np.testing.assert_allclose(np.array(found), np.array(a) @ np.array(b), rtol=1e-5, atol=1e-5)


def test_what_was_not_waited_for_is_not_there() -> None:
    a, b = mx.ones((16, 16), mx.bfloat16), mx.ones((16, 8), mx.bfloat16)
    assert np.isnan(np.array(_product(a, b, mx.bfloat16, waits=False))).all()


def test_blocks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in "123":
        monkeypatch.setenv("EMULATED_SEED", seed)
        given, sums = _meeting(misses=False)
        assert given.tolist() == [1.0, 2.0, 3.0, 4.0]
        assert sums.tolist() == [10.0, 20.0, 30.0, 40.0]


def test_a_barrier_that_not_all_reach_is_told() -> None:
    with pytest.raises(RuntimeError, match="grid_sync of another number of blocks"):
        _meeting(misses=True)


def test_the_card_has_every_function_that_its_twin_has() -> None:
    header = (Path(troupe.policy.__file__).parent / "cuda" / "units.cuh").read_text(encoding="utf-8")
    for name in ("multiply", "load4", "turn_over", "copy16_async", "copies_commit", "copies_wait"):
        assert f" {name}(" in header


def _product(a: mx.array, b: mx.array, dtype: mx.Dtype, waits: bool) -> mx.array:
    kernel = EmulatedKernel("product", ("a", "b", "rows"), ("out",), _PRODUCT)
    (out,) = kernel(
        inputs=[a, b, mx.array([11])],
        template=[("T", dtype), ("WAITS", waits)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(16, 8)],
        output_dtypes=[mx.float32],
    )
    return out


def _meeting(misses: bool) -> tuple[mx.array, mx.array]:
    kernel = EmulatedKernel("meeting", ("counter",), ("given", "sums"), _MEETING)
    given, sums = kernel(
        inputs=[mx.zeros((1,), mx.uint32)],
        template=[("MISSES", misses)],
        grid=(128, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(4,), (4,)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return given, sums
