"""Cached attention against attention over whole rows, written out in numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from troupe.policy.decode import cache as cache_module
from troupe.policy.decode.cache import DecodingCache, PromptCache, join_prompts
from troupe.policy.network.forward import Attention

K, R, D = 2, 3, 4
H = K * R
SCALE = D**-0.5


def random_tokens(rows: int, heads: int, tokens: int, seed: int) -> mx.array:
    return mx.random.normal((rows, heads, tokens, D), key=mx.random.key(seed))


def whole_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One query (H, d) over keys and values (K, n, d) → (H, d), in float64."""
    out = np.empty((H, D))
    for head in range(H):
        scores = keys[head // R].astype(np.float64) @ q[head] * SCALE
        shares = np.exp(scores - scores.max())
        out[head] = (shares / shares.sum()) @ values[head // R]
    return out


def attend_at_random(cache: Attention, layer: int, B: int, T: int, seed: int) -> tuple[mx.array, ...]:
    """Attend with random queries, keys and values → (o, q, k, v)."""
    q, k, v = (random_tokens(B, heads, T, seed + i) for i, heads in enumerate((H, K, K)))
    return cache.attend(layer, q, k, v, SCALE), q, k, v


class Rows:
    """The same tokens kept naively: for each row, its keys and values as growing lists."""

    def __init__(self, lengths: list[int], width: int, layers: int) -> None:
        prompts = PromptCache(lengths)
        self.keys: list[list[np.ndarray]] = []  # layer → row → (K, n, d)
        self.values: list[list[np.ndarray]] = []
        for layer in range(layers):
            _, _, k, v = attend_at_random(prompts, layer, len(lengths), max(lengths), 10 * layer)
            for kept, x in ((self.keys, k), (self.values, v)):
                kept.append([np.array(x[i])[:, :n] for i, n in enumerate(lengths) for _ in range(width)])
        self.cache = DecodingCache(prompts, width, limit=200)
        self.seed = 1000

    def step(self) -> float:
        """Attend with one more random token a row → the largest difference."""
        worst = 0.0
        for layer in range(len(self.keys)):
            B = len(self.keys[layer])
            self.seed += 3
            o, q, k, v = attend_at_random(self.cache, layer, B, 1, self.seed)
            ours = np.array(o)
            for row in range(B):
                self.keys[layer][row] = np.concatenate([self.keys[layer][row], np.array(k[row])], axis=1)
                self.values[layer][row] = np.concatenate([self.values[layer][row], np.array(v[row])], axis=1)
                theirs = whole_attention(np.array(q[row, :, 0]), self.keys[layer][row], self.values[layer][row])
                worst = max(worst, float(np.abs(ours[row, :, 0] - theirs).max()))
        self.cache.advance()
        return worst

    def select(self, slots: list[int], rows: list[int], width: int) -> None:
        self.cache.select(slots, rows, width)
        for kept in (self.keys, self.values):
            for layer in range(len(kept)):
                kept[layer] = [kept[layer][row] for row in rows]


@pytest.mark.parametrize("is_fast", [True, False], ids=["apart", "joined"])
@pytest.mark.parametrize("lengths", [[5, 5], [3, 7, 1]])
def test_two_part_attention_is_attention_over_whole_rows(
    lengths: list[int], is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "is_fast_here", lambda x: is_fast)
    rows = Rows(lengths, width=2, layers=2)
    assert max(rows.step() for _ in range(5)) < 1e-6
    assert rows.cache.length == 5


def test_scores_far_apart_stay_finite() -> None:
    rows = Rows([3, 1], width=2, layers=1)
    rows.step()
    q, k, v = (random_tokens(4, heads, 1, 70 + i) for i, heads in enumerate((H, K, K)))
    o = np.array(rows.cache.attend(0, q * 1e4, k, v, SCALE))
    assert np.isfinite(o).all()
    assert np.abs(o).max() <= max(float(np.abs(np.array(x)).max()) for x in (v, *rows.cache.arrays))


def test_room_grows_in_blocks_and_keeps_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "BLOCK", 3)
    rows = Rows([2, 4], width=2, layers=1)
    assert max(rows.step() for _ in range(8)) < 1e-6
    assert rows.cache.arrays[-1].shape == (2, K, 2, 9, D)


def test_room_is_never_larger_than_the_limit() -> None:
    prompts = PromptCache([2])
    attend_at_random(prompts, 0, 1, 2, 0)
    cache = DecodingCache(prompts, 1, limit=5)
    attend_at_random(cache, 0, 1, 1, 0)
    assert cache.arrays[-1].shape == (1, K, 1, 5, D)


def test_rows_and_slots_can_be_selected_between_tokens() -> None:
    rows = Rows([3, 6, 2], width=3, layers=2)
    rows.step()
    rows.step()
    rows.select([0, 2], [0, 2, 7, 7], width=2)  # prompt 1 leaves; rows 0 and 2 of prompt 0; row 7 of prompt 2 twice
    assert max(rows.step() for _ in range(2)) < 1e-6
    rows.select([0, 0, 1], [1, 0, 3], width=1)  # one prompt in two slots
    assert max(rows.step() for _ in range(2)) < 1e-6
    rows.select([0, 1, 2], [0, 1, 2], width=1)  # nothing leaves
    assert rows.step() < 1e-6


def test_offsets_are_positions() -> None:
    equal, ragged = Rows([4, 4], 2, 1).cache, Rows([4, 6], 2, 1).cache
    equal.advance()
    ragged.advance()
    assert equal.offset == 5
    assert isinstance(ragged.offset, mx.array)
    assert ragged.offset.tolist() == [5, 5, 7, 7]


def test_prompts_prefilled_apart_join_as_if_together() -> None:
    parts = []
    for lengths in ([2, 3], [5]):
        part = PromptCache(lengths)
        for layer in range(2):
            attend_at_random(part, layer, len(lengths), max(lengths), layer)
        parts.append(part)
    expected = [np.array(part.keys[1]) for part in parts]
    whole = join_prompts(parts)
    assert whole.lengths == [2, 3, 5]
    assert [keys.shape for keys in whole.keys] == [(3, K, 5, D)] * 2
    np.testing.assert_array_equal(np.array(whole.keys[1])[:2, :, :3], expected[0])
    np.testing.assert_array_equal(np.array(whole.keys[1])[2:], expected[1])
    assert not parts[0].keys
    assert join_prompts([whole]) is whole
