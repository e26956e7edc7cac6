from __future__ import annotations

import re
from io import StringIO

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.records.members import ALONE, CROWD
from tests.records.sinks.steps import Clock, closed, status, update
from troupe.messages import Activity, Evaluated, Finding, GroupClosed, Incident, Slot
from troupe.records.figures import queue_depths
from troupe.records.sinks.base import RunInfo
from troupe.records.sinks.display import Display
from troupe.records.sinks.display_lines import clock_time, shown_metrics
from troupe.records.sinks.drawing import bar, fitted

RUN = RunInfo(name="kind-001", folder="runs/kind-001", total_steps=100, first_step=0)
METRICS = {
    "step_time": 1.5,
    "reward": 0.25,
    "reward_std": 0.75,
    "reward_std_within_groups": 0.125,
    "rewards/exact/mean": 0.75,
    "rewards/exact/std": 0.3,
    "loss": 0.125,
    "clip_ratio/region_mean": 0.05,
    "learning_rate": 1e-6,
    "completions/mean_length": 5.25,
    "tokens_per_second": 1234.5,
    "peak_memory_gb": 1.25,
    "epoch": 1.5,
    "unheard/of": 1.0,
    "queue/scored/depth": 3.0,
    "queue/scored/wait_s": 9.0,
}


def drawn(display: Display, width: int = 100, height: int = 25) -> list[str]:
    console = Console(file=StringIO(), force_terminal=True, no_color=True, width=width, height=height, record=True)
    console.print(display)
    return [line.rstrip() for line in console.export_text().splitlines()]


def line(display: Display, label: str, width: int = 100) -> str:
    [found] = [text for text in drawn(display, width) if text.startswith(label)]
    return found


def test_shows_what_is_there_in_a_fixed_order() -> None:
    assert shown_metrics(METRICS) == [
        ("reward", "0.250"),
        ("± within group", "0.125"),
        ("± over the batch", "0.750"),
        ("loss", "+0.1250"),
        ("clipped", "5.0%"),
        ("learning rate", "1.00e-06"),
        ("tokens a completion", "5.2"),
        ("tokens/s", "1,234"),
        ("seconds a step", "1.50"),
    ]
    assert shown_metrics({"reward": float("nan")}) == [("reward", "nan")]
    assert queue_depths(METRICS) == {"scored": 3}


def test_figures_of_a_run_that_diverges_leave_room_for_what_they_are_of() -> None:
    display = Display(RUN)
    display.add(update(1, loss=-1e30, grad_norm=3.5e12, kl=float("inf"), reward=2e200))
    text = "\n".join(drawn(display))
    assert {"loss", "gradient", "KL", "reward"} <= set(text.split())
    assert {"-1.00e+30", "3.50e+12", "inf", "2.00e+200"} <= set(text.split())


def test_a_terminal_of_few_letters_can_show_the_name_of_any_reward() -> None:
    display = Display(RUN, encoding="cp1252")
    display.add(update(1, {"rewards/日本/mean": 0.5, "rewards/b/mean": 0.5, "reward": 0.0}))
    display.add(update(2, reward=1.0))
    display.add(update(3, {"rewards/日本/mean": 0.5, "rewards/b/mean": 0.5, "reward": 0.5}))
    text = "\n".join(drawn(display))
    assert r"\u65e5\u672c" in text
    assert "0.000 -> 0.500" in text
    assert text.encode("cp1252")


def test_progress_says_how_much_is_left_at_the_pace_of_the_newest_steps() -> None:
    clock = Clock()
    display = Display(RUN, clock=clock)
    assert line(display, "steps").endswith(" 0 of 100")
    for step in range(1, 11):  # ten slow ones, at the start
        clock.now_s += 60.0
        display.add(update(step, total_steps=100))
    for step in range(11, 51):
        clock.now_s += 2.0
        display.add(update(step, total_steps=100, epoch=step / 40))
    clock.now_s += 1.0
    assert line(display, "steps").endswith(" 50 of 100   0:01:39 left  epoch 1.25 of 2.50")
    assert line(display, "steps", 40).endswith(" 50 of 100   0:01:39 left")
    assert drawn(display)[0] == "kind-001  running  0:11:21"
    display.add(update(100, total_steps=100, epoch=2.5))
    assert line(display, "steps").endswith(" 100 of 100                epoch 2.50 of 2.50")
    assert drawn(display)[0].startswith("kind-001  complete")


def test_bars_are_as_long_as_what_is_done_and_the_rest_is_faint() -> None:
    display = Display(RUN, clock=Clock())
    display.add(update(25, total_steps=100, epoch=1.5))
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=100)
    with console.capture() as capture:
        console.print(display)
    steps = capture.get().splitlines()[1]
    done, rest = (len(re.findall(f"\x1b\\[{style}m([━╾─]+)", steps)[0]) for style in ("36", "2"))
    assert done / (done + rest) == pytest.approx(0.25, abs=0.02)
    assert [text for text, _ in bar(1.0, 4)] == ["━━━━", ""]
    assert [text for text, _ in bar(0.5, 4, "cp1252")] == ["==", "--"]
    assert [text for text, _ in bar(-1.0, 2)] == ["", "──"]


@pytest.mark.parametrize(("width", "height"), [(80, 25), (160, 25), (160, 50)])
def test_the_newest_figures_stand_under_their_headings(width: int, height: int) -> None:
    display = Display(RUN, clock=Clock())
    display.add(update(2, METRICS))
    rows = [text[100 if width == 160 else 0 :].split() for text in drawn(display, width, height)]
    at = next(i for i, row in enumerate(rows) if "learning" in row)
    assert [*rows[at][:2]] == ["learning", "completions"]
    assert [row[:4] for row in rows[at + 1 : at + 2]] == [["loss", "+0.1250", "tokens", "5.2"]]
    text = " ".join(" ".join(row) for row in rows)
    assert all(part in text for part in ("clipped 5.0%", "rate 1.00e-06", "tokens/s 1,234", "memory 1.25 GB"))
    assert "unheard" not in text
    assert line(display, "queues").split() == ["queues", "scored", "3"]


def climbing(steps: int = 30) -> Display:
    """The reward of a run goes from 0 to 1."""
    display = Display(RUN, clock=Clock())
    for step in range(1, steps + 1):
        display.add(update(step, METRICS, total_steps=100, reward=(step - 1) / (steps - 1)))
    return display


@pytest.mark.parametrize(("width", "height"), [(40, 10), (40, 24), (80, 24), (160, 24), (160, 50)])
def test_the_way_of_the_reward_is_the_largest_thing(width: int, height: int) -> None:
    shown = drawn(climbing(), width, height)
    at = next(i for i, text in enumerate(shown) if text.startswith("reward "))
    assert shown[at].startswith("reward    0.000 → 1.000   ± in a group")
    area = [text[:10] for text in shown[at + 1 :]]
    assert area[0].strip() == "1.000"
    rows = next(i for i, label in enumerate(area) if label.strip() == "0.000") + 1
    assert rows >= 3
    assert len(shown) < height
    lowest = shown[at + rows][10:]
    assert lowest.startswith("▁")
    assert len(set(lowest)) > 3
    curve_width = width - 10 - (58 if width == 160 else 0)
    assert lowest[curve_width - 1] == "█"


def test_a_run_of_one_step_and_one_without_a_reward_have_a_place_for_the_curve_too() -> None:
    display = Display(RUN, clock=Clock())
    assert "with the first step" in line(display, "reward")
    before = len(drawn(display))
    display.add(update(1, reward=0.5))
    assert line(display, "reward").split() == ["reward", "0.500"]
    display.add(update(1, reward=float("nan")))
    assert line(display, "reward").split() == ["reward", "0.500"]
    assert before - 3 <= len(drawn(display)) <= before


def finding(title: str = "nothing to learn") -> Finding:
    return Finding(rule="r", title=title, since=31, evidence="92% of the groups are equal", remedy="--set a.b=1")


@pytest.mark.parametrize(("width", "height"), [(40, 10), (40, 24), (80, 10), (80, 24), (160, 24), (160, 50)])
def test_incidents_and_diagnosis_are_seen_in_every_window(width: int, height: int) -> None:
    display = climbing()
    before = drawn(display, width, height)
    display.add(Incident(actor="scorer", kind="odd", message="late " * 100))
    display.add(status(findings=(finding(), finding("other"))))
    after = drawn(display, width, height)
    assert len(after) < height
    assert after[3].startswith("incidents  1  scorer: late")
    at = 5 if (width, height) == (40, 24) else 4  # where it is narrow, what is told of may take two lines
    assert after[at].startswith("diagnosis  nothing to learn ")
    if height > 10:
        assert "try --set a.b=1" in " ".join(" ".join(after[at : at + 4]).split())
    if width > 100:
        assert after[4].endswith("92% of the groups are equal (since step 31); try --set a.b=1 (+1 more)")
    assert len(after) == len(before), "nothing jumps"
    assert "none" not in "".join(after)
    display.add(update(41))
    assert "nothing to learn" not in "".join(drawn(display, width, height))


def test_the_one_set_of_rows_beside_the_prompts_needs_no_name() -> None:
    display = climbing()
    display.add(evaluated(0, 0.25, "held_out"))
    assert line(display, "held-out") == "held-out  avg@4 0.250 ± 0.020 at step 0"


def test_after_a_resume_all_evaluations_before_it_count() -> None:
    past = (evaluated(0, 0.25), evaluated(20, 0.75), evaluated(40, 0.5))
    display = Display(msgspec.structs.replace(RUN, first_step=40, evaluated=past), clock=Clock())
    told = "held-out  sums  avg@4 0.250 → 0.500 ± 0.020 at step 40, best 0.750 at step 20"
    assert told in "\n".join(drawn(display, 120))
    assert line(display, "held-out", 40) == "held-out  sums  avg@4 0.500 (from 0.250)"


def evaluated(version: int, value: float, name: str = "sums") -> Evaluated:
    metrics = {f"eval/{name}/avg@4": value, f"eval/{name}/avg@4_se": 0.02, f"eval/{name}/length": 7.0}
    return Evaluated(version=version, name=name, metrics=metrics, rows=())


@pytest.mark.parametrize("width", [80, 160])
def test_held_out_rows_now_and_at_their_best(width: int) -> None:
    display = climbing()
    display.add(evaluated(0, 0.25))
    assert "held-out  sums  avg@4 0.250 ± 0.020 at step 0" in "\n".join(drawn(display, width))
    display.add(evaluated(20, 0.75))
    display.add(evaluated(40, 0.5))
    told = "held-out  sums  avg@4 0.250 → 0.500 ± 0.020 at step 40, best 0.750 at step 20"
    assert told in "\n".join(drawn(display, width))


@pytest.mark.parametrize("width", [80, 160])
def test_rows_by_pool_have_a_line_where_there_is_a_curriculum(width: int) -> None:
    display = Display(RUN, clock=Clock())
    display.add(update(1, reward=0.5))
    assert "retired" not in "\n".join(drawn(display, width))
    pools = {"curriculum/easy": 12.0, "curriculum/normal": 1500.0, "curriculum/hard": 3.0, "curriculum/retired": 0.0}
    display.add(update(2, {"reward": 0.5} | pools))
    assert "rows      easy 12   normal 1,500   hard 3   retired 0" in "\n".join(drawn(display, width))


def test_reward_functions_share_a_line_where_there_are_several() -> None:
    display = Display(RUN, clock=Clock())
    display.add(update(2, {"reward": 0.5, "rewards/r0/mean": 0.5}))
    assert not [text for text in drawn(display) if text.startswith("rewards")]
    display.add(update(2, {"reward": 0.5} | {f"rewards/r{i}/mean": i / 8 for i in range(20)}))
    assert line(display, "rewards").startswith("rewards   r0 0.000   r1 0.125   r2 0.250")


@pytest.mark.parametrize("height", [1, 2, 5, 7, 12])
def test_a_window_of_few_lines_has_the_first_ones(height: int) -> None:
    display = climbing()
    display.add(Incident(actor="scorer", kind="odd", message="late"))
    shown = drawn(display, 80, height)
    assert [text.split()[0] for text in shown if text][:5] == ["kind-001", "steps", "now", "incidents", "reward"]
    assert len(shown) <= max(5, height - 1)


@pytest.mark.parametrize("width", [30, 44, 60, 80, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal_and_none_comes_or_goes(width: int) -> None:
    display = Display(RUN, clock=Clock())
    display.add(update(1, METRICS))
    before = drawn(display, width)
    display.add(closed(2, texts=("a long answer\n" * 500,), prompt="漢字" * 500))
    display.add(Incident(actor="scorer", kind="odd", message="late " * 100))
    display.add(status("held", held=("the judge is down " * 20,), queues=dict.fromkeys("abcdefghij", 12345)))
    display.add(update(2, METRICS))
    after = drawn(display, width)
    assert len(after) == len(before)
    assert max(map(cell_len, after)) <= width


def test_a_terminal_of_80_columns_has_it_all_in_24_lines() -> None:
    display = Display(RUN, clock=Clock())
    display.add(update(1, METRICS | {f"rewards/r{i}/mean": 0.0 for i in range(9)}))
    shown = drawn(display, 80, 24)
    assert len(shown) <= 23
    labels = {text.split()[0] for text in shown if text}
    assert {"steps", "now", "incidents", "reward", "rewards", "learning", "queues", "prompt", "answer"} <= labels


def test_the_newest_completion_with_its_reward() -> None:
    display = Display(RUN, clock=Clock())
    display.add(closed(1, texts=("46\n\x1b[31m[bold]", "45")))
    assert line(display, "prompt") == "prompt    12+34="
    assert line(display, "answer") == "answer    1.000  46⏎\\x1b[31m[bold]"
    display.add(closed(2, texts=("hm",), rewards=(None,), prompt=[{"role": "user", "content": "hello"}]))
    assert line(display, "prompt") == "prompt    user: hello"
    assert line(display, "answer") == "answer    no score  hm"
    display.add(GroupClosed(gid=9, slot=Slot(step=3, place=0), state="stale", version=3))
    assert line(display, "answer") == "answer    no score  hm"


def test_a_long_answer_has_two_lines_and_shows_how_it_ends() -> None:
    display = Display(RUN, clock=Clock())
    display.add(closed(1, texts=("First " + "and then " * 500 + "the end",)))
    shown = drawn(display, 80)
    at = next(i for i, text in enumerate(shown) if text.startswith("answer"))
    assert shown[at].startswith("answer    1.000  First and then and then")
    assert shown[at + 1].startswith(" " * 10)
    assert shown[at + 1].endswith("and then the end")


def test_what_holds_the_run_up_is_told_before_incidents() -> None:
    display = Display(RUN, clock=Clock())
    assert line(display, "incidents") == "incidents none"
    display.add(Incident(actor="scorer", kind="odd", message="late"))
    assert line(display, "incidents") == "incidents  1  scorer: late"
    display.add(status("held", held=("the judge is down",)))
    assert line(display, "held") == "held      the judge is down"
    assert drawn(display)[0].startswith("kind-001  held")
    display.add(update(1, {"queue/prompts/depth": 7.0}))
    display.add(status("paused", queues={"prompts": 2, "scorer incidents": 0}))
    assert drawn(display)[0].startswith("kind-001  paused")
    assert line(display, "incidents") == "incidents  1  scorer: late"
    assert line(display, "queues").split() == ["queues", "prompts", "2"]


def test_what_the_run_is_at_stands_there_from_the_first_second() -> None:
    display = Display(RUN, clock=Clock())
    assert drawn(display)[0].startswith("kind-001  starting")
    assert line(display, "now") == "now       –"
    display.add(status("starting", activity=Activity(what="held-out rows", detail=" 37 / 400 (12 s)")))
    assert drawn(display)[0].startswith("kind-001  starting")
    assert line(display, "now") == "now       held-out rows 37 / 400 (12 s)"
    wait = Activity(what="waiting for reward j\x1b[2J", detail=": refused (12 tries, 34 s); " + "x" * 200, waiting=True)
    display.add(status("starting", activity=wait))
    assert line(display, "now", 80).startswith("now       waiting for reward j\\x1b[2J: refused (12 tries, 34 s); x")
    assert max(map(cell_len, drawn(display, 80))) <= 80
    display.add(status("running"))
    assert drawn(display)[0].startswith("kind-001  running")
    assert line(display, "now") == "now       –"


def test_fitted_text_keeps_its_ends() -> None:
    assert fitted("short", 5) == "short"
    assert fitted("abcdefghijklmnop", 11) == "abcd … mnop"
    assert fitted("漢字" * 10, 11) == "漢字 … 漢字"
    for width in range(5, 30):
        assert cell_len(fitted("漢x字" * 10, width)) <= width


def test_times_as_a_clock_shows_them() -> None:
    assert [clock_time(s) for s in (0.4, 61, 3661, 90061, -1)] == [
        "0:00:00",
        "0:01:01",
        "1:01:01",
        "1 d 1:01:01",
        "0:00:00",
    ]


def test_a_notice_stands_where_a_line_is_kept_free_for_it() -> None:
    display = Display(RUN)
    display.add(status())
    before = drawn(display)
    display.add(status("draining", notice="finishing step 2; Ctrl-C again stops now\x1b[2J"))
    after = drawn(display)
    assert [new for old, new in zip(before[1:], after[1:], strict=True) if old != new] == [
        r"finishing step 2; Ctrl-C again stops now\x1b[2J"
    ]
    display.add(update(100, total_steps=100))
    assert "finishing" not in "\n".join(drawn(display))


@pytest.mark.parametrize("width", [40, 80, 160])
def test_workers_have_a_line_that_says_first_how_many_are_at_work(width: int) -> None:
    display = Display(RUN, clock=Clock())
    display.add(update(1, METRICS))
    before = drawn(display, width)
    display.add(status(members=(ALONE,)))
    assert [text.split() for text in drawn(display, width)[1:]] == [text.split() for text in before[1:]]
    display.add(status(members=CROWD))
    shown = next(text for text in drawn(display, width) if text.startswith("workers"))
    assert shown.startswith("workers   1 of 2 at work, 212")
    assert cell_len(shown) <= width
    assert len(drawn(display, width)) <= len(before) + 1
    if width == 160:
        assert shown.endswith("2 gone   laptop 212  studio silent 12 s  old-mini refused  judge idle")


def test_without_colours_it_says_the_same() -> None:
    display = climbing()
    display.add(Incident(actor="scorer", kind="odd", message="late"))
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", no_color=True, width=80, height=25)
    with console.capture() as capture:
        console.print(display)
    assert not re.search(r"\x1b\[[0-9;]*\b[34][0-9]\b", capture.get())
    assert [text.rstrip() for text in re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).splitlines()] == drawn(display, 80)
