"""What differs between configurations, what belongs together, and what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from troupe.records.compare.settings import differences, group_name, groups_of, settings_of, short_names

BASE = {
    "seed": 1,
    "output": "/runs/a",
    "learner": {"lr": 1e-5, "max_steps": 9},
    "rewards": {"functions": ["exact_answer"]},
    "evaluation": {"sets": [{"name": "sums", "num_samples": 4}, {"path": "/b"}]},
}


def changed(**sections: object) -> dict[str, object]:
    return {**BASE, **sections}


def test_keys_are_dotted_and_tables_in_lists_go_by_their_names() -> None:
    settings = settings_of(BASE)
    assert settings["learner.lr"] == 1e-5
    assert settings["rewards.functions"] == ["exact_answer"]
    assert settings["evaluation.sets.sums.num_samples"] == 4
    assert settings["evaluation.sets.2.path"] == "/b"


def test_only_what_differs_is_told_and_never_the_folder() -> None:
    other = changed(output="/runs/b", learner={"lr": 2e-5, "max_steps": 9}, adapter={"kind": "lora"})
    found = differences([settings_of(BASE), settings_of(other)])
    assert [(one.key, one.values) for one in found] == [
        ("learner.lr", (1e-5, 2e-5)),
        ("adapter.kind", (None, "lora")),
    ]
    assert differences([settings_of(BASE), settings_of(BASE)]) == []


def test_other_seeds_of_one_configuration_are_together() -> None:
    runs = [BASE, changed(learner={"lr": 1.0}), changed(seed=2), changed(seed=3, metrics={"sinks": []}), {}, {}]
    assert groups_of([settings_of(run) for run in runs]) == [[0, 2, 3], [1], [4], [5]]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/runs/a", "/runs/b"], ["a", "b"]),
        (["/x/lr/seed-1", "/x/kl/seed-1", "/y/other"], ["lr/seed-1", "kl/seed-1", "other"]),
        (["/a", "/b/a"], ["/a", "b/a"]),
    ],
)
def test_names_are_short_and_differ(folders: list[str], names: list[str]) -> None:
    assert short_names([Path(folder) for folder in folders]) == names


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["seed-1", "seed-2", "seed-30"], "seed-*"),
        (["s1/sums", "s2/sums"], "s*/sums"),
        (["aa", "aaa"], "aa*"),
        (["one", "two"], "one and 1 more"),
        (["alone"], "alone"),
    ],
)
def test_a_group_is_called_by_what_its_names_share(names: list[str], name: str) -> None:
    assert group_name(names) == name
