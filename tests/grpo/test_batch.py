"""Padding, masks from lengths, and micro-batches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from troupe.grpo.batch import Batch, make_batch, split

PROMPTS = [[5], [6, 7, 8], [9, 0], [4, 4, 4, 4]]
COMPLETIONS = [[0, 1, 0], [2], [], [3, 0]]
LOG_PROBS = [[-1.0, -2.0, -3.0], [-4.0], [], [-5.0, -6.0]]


def batch(**changes: Any) -> Batch:
    arguments = {"truncated": [False, True, False, False]} | changes
    return make_batch(PROMPTS, COMPLETIONS, LOG_PROBS, [1.0, -1.0, 0.5, 0.0], pad_id=0, **arguments)


def test_prompts_are_padded_left_and_completions_right() -> None:
    b = batch()
    assert b.prompt_ids.tolist() == [[0, 0, 0, 5], [0, 6, 7, 8], [0, 0, 9, 0], [4, 4, 4, 4]]
    assert b.completion_ids.tolist() == [[0, 1, 0], [2, 0, 0], [0, 0, 0], [3, 0, 0]]
    assert b.sampling_log_probs.tolist() == [[-1, -2, -3], [-4, 0, 0], [0, 0, 0], [-5, -6, 0]]
    assert b.advantages.tolist() == [1.0, -1.0, 0.5, 0.0]
    assert b.prompt_ids.dtype == b.completion_ids.dtype == mx.int32


def test_ids_are_kept_as_they_came_and_padded_once() -> None:
    b = make_batch([[5, 6], (7,)], [[1], (2, 3)], [[0.0], [0.0, 0.0]], [0.0, 0.0], pad_id=99)
    assert b.prompts == ((5, 6), (7,))
    assert b.completions == ((1,), (2, 3))
    assert b.prompt_ids.tolist() == [[5, 6], [99, 7]]
    assert b.completion_ids.tolist() == [[1, 99], [2, 3]]
    assert b.prompt_ids is b.prompt_ids
    assert b.completion_ids is b.completion_ids
    part = b.rows(slice(1, 2))
    assert (part.prompts, part.completions, part.pad_id) == (((7,),), ((2, 3),), 99)
    assert part.prompt_ids.tolist() == [[7]], "a part pads its own rows"
    assert b.without_truncated().completion_ids.tolist() == b.completion_ids.tolist()


def test_completions_that_are_all_empty_have_one_column_of_padding() -> None:
    b = make_batch([[1], [2]], [[], []], [[], []], [0.0, 0.0], pad_id=9)
    assert b.completion_ids.tolist() == [[9], [9]]
    assert b.completion_mask.tolist() == b.sampling_log_probs.tolist() == [[0], [0]]


def test_the_mask_follows_lengths_even_where_a_completion_holds_the_padding_id() -> None:
    assert batch().completion_mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_counts() -> None:
    b = batch()
    assert (b.num_rows, b.num_completion_tokens, b.num_tokens) == (4, 6, 16)


def test_truncated_rows_leave_the_mask_alone() -> None:
    b = batch().without_truncated()
    assert b.completion_mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert b.completion_lengths == (3, 1, 0, 2)
    assert batch(truncated=None).without_truncated().completion_mask.tolist() == batch().completion_mask.tolist()


def test_rows_trims_the_padding_that_no_row_needs() -> None:
    part = batch().rows(slice(1, 3))
    assert part.prompt_ids.tolist() == [[6, 7, 8], [0, 9, 0]]
    assert part.completion_ids.tolist() == [[2], [0]]
    assert part.completion_mask.tolist() == [[1], [0]]
    assert part.sampling_log_probs.tolist() == [[-4], [0]]
    assert part.advantages.tolist() == [-1.0, 0.5]
    assert (part.prompt_lengths, part.completion_lengths, part.truncated) == ((3, 2), (1, 0), (True, False))


@pytest.mark.parametrize(("n", "sizes"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (4, [1] * 4), (9, [1] * 4)])
def test_split_cuts_neighbouring_rows_into_parts_of_almost_equal_size(n: int, sizes: list[int]) -> None:
    parts = split(batch(), n)
    assert [part.num_rows for part in parts] == sizes
    assert [length for part in parts for length in part.prompt_lengths] == [1, 3, 2, 4]
    assert sum(part.num_tokens for part in parts) == batch().num_tokens


def test_split_and_rows_refuse_what_gives_nothing() -> None:
    with pytest.raises(ValueError, match="0 micro-batches"):
        split(batch(), 0)
    with pytest.raises(ValueError, match="none of the 4 rows"):
        batch().rows(slice(4, 6))


@pytest.mark.parametrize(
    ("prompts", "completions", "log_probs", "advantages", "truncated", "message"),
    [
        ([], [], [], mx.zeros(0), None, "0 rows"),
        ([[1]], [[1], [2]], [[0.0]], mx.zeros(1), None, "completions has 2 rows"),
        ([[1]], [[1]], [], mx.zeros(1), None, "sampling_log_probs has 0 rows"),
        ([[1]], [[1]], [[0.0]], mx.zeros(2), None, r"advantages has the shape \(2,\)"),
        ([[1]], [[1]], [[0.0]], mx.zeros(1), [], "truncated has 0 rows"),
        ([[]], [[1]], [[0.0]], mx.zeros(1), None, r"prompts\[0\] is empty"),
        ([[1]], [[1, 2]], [[0.0]], mx.zeros(1), None, r"sampling_log_probs\[0\] has 1 values for the 2 tokens"),
    ],
)
def test_lengths_that_disagree_are_refused(
    prompts: Any, completions: Any, log_probs: Any, advantages: Any, truncated: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_batch(prompts, completions, log_probs, advantages, pad_id=0, truncated=truncated)


def test_rows_can_be_selected_in_any_order() -> None:
    part = batch().select([3, 1])
    assert part.completion_ids.tolist() == [[3, 0], [2, 0]]
    assert part.prompts == ((4, 4, 4, 4), (6, 7, 8))
    assert part.completion_mask.tolist() == [[1, 1], [1, 0]]
    assert part.sampling_log_probs.tolist() == [[-5, -6], [-4, 0]]
    assert part.advantages.tolist() == [0.0, -1.0]
    assert part.truncated == (False, True)
    with pytest.raises(ValueError, match="none of the 4 rows of the batch is selected; take at least one"):
        batch().select([])


def test_tokens_are_masked_and_rows_without_any_are_gone() -> None:
    b = batch()
    assert b.with_tokens([[True] * 3, [True], [], [True] * 2]) is b
    fewer = b.with_tokens([[False, True, True], [False], [], [True, False]])
    assert fewer.completion_mask.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert fewer.completions == ((0, 1, 0), (), (3, 0)), "one that had none before stays"
    assert fewer.without_truncated().completion_mask.tolist() == fewer.completion_mask.tolist()
    cut = batch(truncated=[True, False, False, False]).with_tokens([[False, True, True], [True], [], [True, False]])
    assert cut.without_truncated().completion_mask.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]]
