"""The layout of packed rows by hand, and packed attention against attention row by row in numpy."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.devices import compute_on
from troupe.policy.network import attention
from troupe.policy.network.layouts import SQUARE, Cells, read_rows
from troupe.policy.network.packing import Packing

H, K, D = 4, 2, 8
SCALE = 0.4


@pytest.fixture(params=["in parts", "in whole rows", "in portions of whole rows"])
def attention_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways of attending, wherever the tests run."""
    compute_on(monkeypatch, cpu=request.param == "in parts")
    in_portions = request.param == "in portions of whole rows"
    monkeypatch.setattr(attention, "attention_is_fused", lambda *of, **kind: not in_portions)
    if in_portions:  # two of four heads
        monkeypatch.setattr(attention, "PORTION", 2 * SQUARE**2)
    return str(request.param)


@pytest.mark.parametrize(
    ("lengths", "laid_out"),
    [
        ([2, 2], [[1, 2], [3, 4]]),
        ([3, 1, 2], [[1, 2, 3], [4, 0, 0], [5, 6, 0]]),
        ([0, 2, 0], [[0, 0], [1, 2], [0, 0]]),
        ([0, 0], [[0], [0]]),
        ([1], [[1]]),
    ],
)
@pytest.mark.usefixtures("attention_path")
def test_cells_are_spread_and_collected(lengths: list[int], laid_out: list[list[int]]) -> None:
    cells = Cells(lengths)
    x = mx.arange(1, cells.count + 1).astype(mx.float32)
    assert cells.spread(x).tolist() == laid_out
    assert cells.collect(mx.array(laid_out, mx.float32)).tolist() == x.tolist()
    wide = mx.stack([x, -x], axis=-1)
    assert cells.spread(wide)[..., 1].tolist() == (-cells.spread(x)).tolist()
    assert cells.collect(cells.spread(wide)).tolist() == wide.tolist()


@pytest.mark.parametrize("lengths", [[2, 2], [3, 1, 2], [0, 2, 0]])
@pytest.mark.usefixtures("attention_path")
def test_each_layout_is_the_gradient_of_the_other(lengths: list[int]) -> None:
    cells = Cells(lengths)
    flat = mx.random.normal((cells.count, 2), key=mx.random.key(0))
    laid_out = mx.random.normal((len(lengths), cells.width, 2), key=mx.random.key(1))
    by_flat = mx.grad(lambda x: (cells.spread(x) * laid_out).sum())(flat)
    by_laid_out = mx.grad(lambda x: (cells.collect(x) * flat).sum())(laid_out)
    assert by_flat.tolist() == cells.collect(laid_out).tolist()
    assert by_laid_out.tolist() == cells.spread(flat).tolist()


PROMPTS = [[5, 6], [5, 6], [7], [5, 6], [8, 9, 3]]
COMPLETIONS = [[20, 21, 22], [23], [], [24, 25], [26, 27]]


def test_prompts_and_completions_stand_where_they_should() -> None:
    packing = Packing(PROMPTS, COMPLETIONS)
    # [5, 6] once for its two neighbours, and again where it comes back
    assert packing.ids.tolist() == [5, 6, 7, 5, 6, 8, 9, 3, 20, 21, 24, 26]
    assert packing.offset.tolist() == [[0, 1, 0, 0, 1, 0, 1, 2, 2, 3, 2, 3]]
    assert packing.targets.tolist() == [20, 23, 24, 26, 21, 22, 25, 27]
    assert packing.ids.dtype == packing.targets.dtype == packing.offset.dtype == mx.int32


def test_every_target_has_the_token_before_it_as_source() -> None:
    packing = Packing(PROMPTS, COMPLETIONS)
    hidden = mx.stack([mx.arange(12), -mx.arange(12)], axis=-1).astype(mx.float32)
    # the last tokens of the prompts of all that begun, then 20, 21, 24 and 26
    assert packing.sources(hidden)[:, 0].tolist() == [1, 1, 4, 7, 8, 9, 10, 11]
    weights = mx.arange(1.0, 9.0)
    gradient = mx.grad(lambda x: (packing.sources(x)[:, 0] * weights).sum())(hidden)
    assert gradient[:, 0].tolist() == [0, 1 + 2, 0, 0, 3, 0, 0, 4, 5, 6, 7, 8]
    assert not mx.any(gradient[:, 1]).item()


def test_numbers_of_targets_come_into_rows() -> None:
    packing = Packing(PROMPTS, COMPLETIONS)
    rows = packing.in_rows(packing.targets.astype(mx.float32))
    assert rows.tolist() == [[20, 21, 22], [23, 0, 0], [0, 0, 0], [24, 25, 0], [26, 27, 0]]
    weights = mx.arange(15.0).reshape(5, 3)
    gradient = mx.grad(lambda x: (packing.in_rows(x) * weights).sum())(mx.zeros(8))
    assert gradient.tolist() == [0, 3, 9, 12, 1, 2, 10, 13]


def test_equal_prompts_are_found_by_value_and_by_identity() -> None:
    shared = (1, 2)
    assert Packing([shared, shared, [1, 2]], [[3], [4], [5]]).ids.tolist() == [1, 2]
    assert Packing([[1], [2], [1]], [[3], [4], [5]]).ids.tolist() == [1, 2, 1]


def tokens_of_rows(prompts: list[list[int]], completions: list[list[int]]) -> list[list[int]]:
    """Where in the packed row stands each token of every row, by another route: a dict from place to number."""
    number: dict[tuple[str, int, int], int] = {}
    owner: list[int] = []
    for row, prompt in enumerate(prompts):
        owner.append(owner[-1] if row and prompt == prompts[row - 1] else row)
        for t in range(len(prompt)):
            number.setdefault(("prompt", owner[row], t), len(number))
    for row, completion in enumerate(completions):
        for t in range(len(completion) - 1):
            number["completion", row, t] = len(number)
    return [
        [number["prompt", owner[row], t] for t in range(len(prompt))]
        + [number["completion", row, t] for t in range(len(completion) - 1)]
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def attention_by_definition(rows: list[list[int]], q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Every row by itself, all (heads, N, D), in float64. Tokens in several rows come out the same in all."""
    out = np.full((H, q.shape[1], D), np.nan)
    for row in rows:
        for place, token in enumerate(row):
            for head in range(H):
                scores = SCALE * k[head // (H // K), row[: place + 1]] @ q[head, token]
                shares = np.exp(scores - scores.max())
                o = shares / shares.sum() @ v[head // (H // K), row[: place + 1]]
                assert np.allclose(out[head, token], o) or np.isnan(out[head, token]).all()
                out[head, token] = o
    return out


def attend_row_by_row(rows: list[list[int]], q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """The same by MLX's own operations, to be differentiated: of a token in several rows, the first row's counts."""
    N = q.shape[2]
    out = mx.zeros((1, H, N, D))
    seen: set[int] = set()
    for row in rows:
        index = mx.array(row)
        T = len(row)
        keys, values = (mx.repeat(x[:, :, index], H // K, axis=1) for x in (k, v))
        scores = SCALE * (q[:, :, index] @ keys.swapaxes(-1, -2))
        scores = mx.where(mx.arange(T) <= mx.arange(T)[:, None], scores, -mx.inf)
        o = mx.softmax(scores, axis=-1) @ values
        fresh = [place for place, token in enumerate(row) if token not in seen]
        if fresh:
            place_of = np.zeros((N, T), np.float32)
            place_of[[row[place] for place in fresh], fresh] = 1
            out = out + mx.array(place_of) @ o
        seen |= set(row)
    return out


def random_tokens(N: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Queries, keys, values, and a cotangent of what comes out."""
    keys = mx.random.split(mx.random.key(N), 4)
    q, k, v, cotangent = (
        mx.random.normal((1, heads, N, D), key=key) for heads, key in zip((H, K, K, H), keys, strict=True)
    )
    return q, k, v, cotangent


def check_attention(prompts: list[list[int]], completions: list[list[int]]) -> None:
    """Packed attention and its gradients against each row alone."""
    packing = Packing(prompts, completions)
    rows = tokens_of_rows(prompts, completions)
    q, k, v, cotangent = random_tokens(packing.ids.size)
    o = np.array(packing.attend(0, q, k, v, SCALE))[0]
    arrays = [np.array(x)[0].astype(np.float64) for x in (q, k, v)]
    np.testing.assert_allclose(o, attention_by_definition(rows, *arrays), atol=2e-6)

    def score(attend: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda q, k, v: (attend(q, k, v) * cotangent).sum()

    ours = mx.grad(score(lambda q, k, v: packing.attend(0, q, k, v, SCALE)), argnums=(0, 1, 2))(q, k, v)
    theirs = mx.grad(score(lambda q, k, v: attend_row_by_row(rows, q, k, v)), argnums=(0, 1, 2))(q, k, v)
    by_hand = packing.attend_gradient(q, k, v, SCALE, cotangent, packing.attend_keeping(q, k, v, SCALE))
    for one, same, other in zip(ours, by_hand, theirs, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=5e-6)
        np.testing.assert_allclose(np.array(same), np.array(other), atol=5e-6)


CASES = {
    "ragged": (PROMPTS, COMPLETIONS),
    "one row": ([[1, 2, 3]], [[4, 5]]),
    "one token each": ([[1]], [[2]]),
    "a group": ([[1, 2]] * 4, [[3, 4, 5], [6], [], [7, 8, 9, 10]]),
    "full rectangles": ([[1, 2]] * 2 + [[3, 4]] * 2, [[5, 6, 7]] * 4),
    "equal prompts, ragged completions": ([[1, 2]] * 2 + [[3, 4]] * 2, [[5, 6, 7], [8, 9], [10, 11], [12, 13, 14]]),
    "no completion has inner tokens": ([[1, 2], [3]], [[4], []]),
    "groups of many sizes": (
        [[1, 2, 3]] * 3 + [[4]] + [[5, 6]] * 2,
        [[1, 2], [3, 4, 5], [6, 7], [8, 9, 10, 11, 12], [13], [14, 15]],
    ),
}


@pytest.mark.usefixtures("attention_path")
@pytest.mark.parametrize("name", CASES)
def test_tokens_attend_as_in_rows_of_their_own(name: str) -> None:
    check_attention(*CASES[name])


GROUPS = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=GROUPS, same=st.booleans())
def test_any_lengths_and_groups_attend_as_in_rows_of_their_own(
    attention_path: str, groups: list[tuple[int, list[int]]], same: bool
) -> None:
    assert (Packing([[1]], [[2]])._whole_rows is None) == (attention_path == "in parts")
    prompts, completions = [], []
    for number, (prompt_length, lengths) in enumerate(groups):
        for length in lengths:
            prompts.append([0 if same else number, *range(1, prompt_length)])
            completions.append(list(range(100, 100 + length)))
    check_attention(prompts, completions)


@pytest.mark.usefixtures("attention_path")
def test_low_precision_stays_near() -> None:
    packing = Packing(*CASES["groups of many sizes"])
    q, k, v, _ = (x.astype(mx.bfloat16) for x in random_tokens(packing.ids.size))
    exact_q, exact_k, exact_v = (x.astype(mx.float32) for x in (q, k, v))
    exact = packing.attend(0, exact_q, exact_k, exact_v, SCALE)
    rounded = packing.attend(0, q, k, v, SCALE)
    assert rounded.dtype == mx.bfloat16
    assert float(mx.abs(rounded.astype(mx.float32) - exact).max()) < 0.03
    gradient = mx.grad(lambda k: packing.attend(0, q, k, v, SCALE).astype(mx.float32).sum())(k)
    exact = mx.grad(lambda k: packing.attend(0, exact_q, k, exact_v, SCALE).sum())(exact_k)
    assert gradient.dtype == mx.bfloat16
    assert float(mx.linalg.norm(gradient.astype(mx.float32) - exact) / mx.linalg.norm(exact)) < 0.02


@pytest.mark.parametrize(("dtype", "width"), [(mx.float32, 4), (mx.float32, 3), (mx.bfloat16, 4), (mx.bfloat16, 5)])
@pytest.mark.usefixtures("attention_path")
def test_rows_are_read_whole_whatever_their_width(dtype: mx.Dtype, width: int) -> None:
    x = mx.random.normal((6, width, 2), key=mx.random.key(4)).astype(dtype)[:, :, :1]
    read = read_rows(x, mx.array([[5, 0], [3, 3]]))
    assert read.dtype == dtype
    assert mx.array_equal(read, mx.stack([mx.stack([x[5], x[0]]), mx.stack([x[3], x[3]])])).item()
