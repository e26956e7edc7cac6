"""Which checkpoints stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.checkpoints import assert_same, made
from troupe.checkpoint import (
    MANIFEST,
    CheckpointConfig,
    Pruned,
    checkpoint_folder,
    clear_leftovers,
    list_checkpoints,
    load_checkpoint,
    newer_versions,
    prune_checkpoints,
    save_checkpoint,
)
from troupe.errors import RunError


def stand(run: Path, rewards: dict[int, float | None]) -> None:
    """Finished folders as far as pruning looks at them, each with its mean reward, or none."""
    for version, reward in rewards.items():
        folder = checkpoint_folder(run, version)
        folder.mkdir(parents=True)
        metrics = "{}" if reward is None else f'{{"reward": {reward}, "loss": {-reward}}}'
        (folder / "state.json").write_text(f'{{"version": {version}, "metrics": {metrics}}}')
        (folder / MANIFEST).write_text("{}")


def versions(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(run)]


def config(**settings: Any) -> CheckpointConfig:
    return CheckpointConfig(**({"keep": 2} | settings))


def test_folders_are_numbered_by_step(run: Path) -> None:
    assert checkpoint_folder(run, 10) == run / "checkpoints" / "step-00000010"
    assert CheckpointConfig() == CheckpointConfig(
        every=50, keep=2, keep_best=True, metric_for_best="reward", greater_is_better=True
    )


def test_the_newest_and_the_best_stay(run: Path) -> None:
    stand(run, {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.8, 5: 0.1})
    assert prune_checkpoints(run, config()) == Pruned(removed=(1, 3))
    assert versions(run) == [5, 4, 2]
    assert prune_checkpoints(run, config()) == Pruned()
    stand(run, {6: 0.95})
    assert prune_checkpoints(run, config()).removed == (2, 4), "the new one is better"
    assert versions(run) == [6, 5]


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({"keep_best": False}, [5, 4]),
        ({"greater_is_better": False}, [5, 4, 1]),
        ({"metric_for_best": "loss"}, [5, 4, 1]),
        ({"metric_for_best": "loss", "greater_is_better": False}, [5, 4, 2]),
        ({"metric_for_best": "no such"}, [5, 4]),
        ({"keep": 1}, [5, 2]),
        ({"keep": 9}, [5, 4, 3, 2, 1]),
    ],
)
def test_what_is_best_is_for_the_config_to_say(run: Path, settings: dict[str, Any], stay: list[int]) -> None:
    stand(run, {1: 0.1, 2: 0.9, 3: 0.4, 4: 0.8, 5: 0.3})
    prune_checkpoints(run, config(**settings))
    assert versions(run) == stay


def test_what_has_no_number_never_wins_and_of_equals_the_newer_does(run: Path) -> None:
    stand(run, {1: 0.5, 2: 0.5, 3: None, 4: None, 5: None})
    for version, metrics in ((3, "NaN"), (4, "null")):
        (checkpoint_folder(run, version) / "state.json").write_text(f'{{"metrics": {{"reward": {metrics}}}}}')
    prune_checkpoints(run, config(keep=1))
    assert versions(run) == [5, 2]


@pytest.mark.parametrize("state", ["", "[]", '{"metrics": 3}', '{"metrics": {"reward": "much"}}', None])
def test_a_state_that_cannot_be_read_never_wins(run: Path, state: str | None) -> None:
    stand(run, {1: 0.9, 2: 0.1, 3: None})
    file = checkpoint_folder(run, 1) / "state.json"
    file.unlink() if state is None else file.write_text(state)
    prune_checkpoints(run, config(keep=1))
    assert versions(run) == [3, 2]


def test_a_real_state_says_how_good_it_is(run: Path) -> None:
    for version, reward in ((1, 0.7), (2, 0.2), (3, 0.3)):
        save_checkpoint(checkpoint_folder(run, version), made(version, metrics={"reward": reward}))
    prune_checkpoints(run, config(keep=1))
    assert versions(run) == [3, 1]
    assert_same(load_checkpoint(checkpoint_folder(run, 1)), made(1, metrics={"reward": 0.7}))


def test_an_abandoned_future_goes_and_is_never_counted(run: Path) -> None:
    stand(run, {3: 0.1, 4: 0.2, 5: 0.3, 8: 0.9, 12: 0.99})
    assert newer_versions(run, 5) == {8, 12}
    assert prune_checkpoints(run, config(), abandoned={8, 12}) == Pruned(removed=(3, 8, 12))
    assert versions(run) == [5, 4]
    assert newer_versions(run, 5) == set()
    assert newer_versions(run / "nowhere", -1) == set()


def test_leftovers_are_cleared_and_strangers_left_alone(run: Path) -> None:
    stand(run, {1: 0.1, 3: 0.3})
    folders = run / "checkpoints"
    for name in (".writing-step-00000004", ".replaced-step-00000003", "step-00000004", "notes", "step-x"):
        (folders / name).mkdir()
        (folders / name / "file").write_text("x")
    (folders / ".writing-step-00000004" / MANIFEST).write_text("{}")
    assert prune_checkpoints(run, config()) == Pruned(), "what was never finished is not told of"
    assert sorted(path.name for path in folders.iterdir()) == ["notes", "step-00000001", "step-00000003", "step-x"]


def test_clearing_leftovers_touches_nothing_that_is_finished(run: Path) -> None:
    stand(run, {1: 0.1, 2: 0.3})
    folders = run / "checkpoints"
    checkpoint_folder(run, 1).rename(folders / ".replaced-step-00000001")
    for name in (".writing-step-00000002", "step-00000004"):
        (folders / name).mkdir()
    (folders / ".writing-step-00000002" / MANIFEST).write_text("{}")
    clear_leftovers(run)
    assert sorted(path.name for path in folders.iterdir()) == [".replaced-step-00000001", "step-00000002"]
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002", ".replaced-step-00000001"]
    clear_leftovers(run / "nowhere")


def test_what_waited_while_it_was_replaced_goes_when_that_is_done(run: Path) -> None:
    stand(run, {1: 0.1, 2: 0.2})
    shutil.copytree(checkpoint_folder(run, 2), run / "checkpoints" / ".replaced-step-00000002")
    assert prune_checkpoints(run, config()) == Pruned(), "version 2 is still there"
    assert versions(run) == [2, 1]


def test_what_cannot_be_removed_is_told_and_the_others_go(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand(run, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    remove = shutil.rmtree

    def stuck(path: Path, *args: Any, **settings: Any) -> None:
        if path.name == "step-00000002":
            raise OSError(16, "Device or resource busy")
        remove(path, *args, **settings)

    monkeypatch.setattr(shutil, "rmtree", stuck)
    pruned = prune_checkpoints(run, config(keep=1))
    assert pruned.removed == (1, 3)
    assert pruned.faults == (f"{checkpoint_folder(run, 2)}: [Errno 16] Device or resource busy",)
    assert versions(run) == [4], "half removed, so no checkpoint any more"


def test_where_nobody_can_tell_which_there_are_a_run_does_not_begin_anew(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list_checkpoints(run) == [], "no folder yet: nothing to go on from"
    stand(run, {1: 0.1})

    def closed(_: Path) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "iterdir", closed)
    for ask in (list_checkpoints, lambda run: newer_versions(run, 0)):
        with pytest.raises(RunError, match=r"its checkpoints cannot be listed now: .*Too many open files"):
            ask(run)
    with pytest.raises(OSError, match="Too many open files"):
        clear_leftovers(run)
