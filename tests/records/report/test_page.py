"""The page: figures, escaping, self-containment, size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import msgspec
import pytest

from tests.records.members import ALONE, LAPTOP
from tests.records.report.folders import Clock, finish, make_run, metrics_of, tell
from tests.records.report.pages import Page
from tests.records.sinks.steps import evaluated, status
from tests.support.stored import LONG_RESULT, acted, acted_rollout, closed, update
from troupe.messages import Answer, CheckpointWritten, Incident, PromptText, ToolCall
from troupe.records.browse import part_in
from troupe.records.layout import STORE
from troupe.records.report.page import report_page
from troupe.records.report.picture import read_run
from troupe.records.report.static import script_safe
from troupe.records.sinks.sqlite import SqliteSink

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></main></body></html>",
    "<!-- <script> ]]> -->",
    "{{ run.folder }} {% raw %}",
    "&lt;b&gt; &amp; \"quotes\" 'and' `more` ${x}",
    "\u2028\u2029 \x00\x1b[31m\u202egnp.exe",
    "\ud800 lone",
]


def page_of(folder: Path) -> Page:
    return Page(report_page(read_run(folder), part_in(folder)))


def test_the_figures_are_those_of_the_lines(tmp_path: Path) -> None:
    make_run(tmp_path, 5)
    data = page_of(tmp_path).data
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [axes] = data["axes"]
    assert axes["step"] == [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert axes["time"] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert axes["tokens"] == [100, 200, 300, 400, 500]
    drawn = {chart["title"]: chart for chart in data["charts"]}
    for title, metric in {
        "Loss": "loss",
        "KL to the reference": "kl",
        "Reward": "reward",
        "Tokens a second": "tokens_per_second",
        "judge/speed": "judge/speed",
    }.items():
        [series] = drawn[title]["series"]
        assert series["y"] == pytest.approx([line[metric] for line in lines], rel=1e-4)
    assert [one["name"] for one in drawn["Parts of the reward"]["series"]] == ["r", "style"]
    assert drawn["Parts of the reward"]["series"][1]["y"] == [0.95, None, 0.85, 0.8, 0.75]
    assert (drawn["Time of a step"]["format"], drawn["Time of a step"]["min"]) == ("seconds", 0.0)
    assert "min" not in drawn["Loss"]


def test_every_chart_has_its_place(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    places = [attributes["data-chart"] for attributes in page.attributes("figure")]
    assert places == [str(number) for number in range(len(page.data["charts"]))]
    bars = [attributes["data-bars"] for attributes in page.attributes("div") if "data-bars" in attributes]
    assert bars == ["actors", "beside"]
    [learner] = page.data["bars"]["actors"]
    assert learner["name"] == "learner"
    assert [part["value"] for part in learner["parts"]] == [0.5, 0.25, 0.25]
    [reward] = page.data["bars"]["beside"]
    assert [part["value"] for part in reward["parts"]] == [2.5, 0.625]
    assert reward["note"] == "2.5 s hidden, 625 ms exposed"


def test_what_one_reads_first(tmp_path: Path) -> None:
    make_run(tmp_path / "kind run", 5)
    finish(tmp_path / "kind run", 5, 5, accuracy_before=0.25, accuracy_after=0.5, rewards_after={"r": 0.5, "s": 0.75})
    page = page_of(tmp_path / "kind run")
    assert "kind run" in page.within("h1")
    assert "finished" in page.within("span")
    text = page.visible
    for part in (
        "reward 0.5 from 0.1",
        "held-out accuracy 50.0 % from 25.0 %",
        "r – 0.5",
        "steps 5 of 5, epoch 1.25",
        "time 50 s",
        "tokens/s 30 500 in all",
        "device busy 75.0 %",
        "peak memory 1.5 GB",
        "incidents 0",
        "tiny <b>model · began",
        "node-7, 4 processors · Troupe 0.9",
        "exact_answer, /home/me/judge.py:score",
        "0 throughout, and not drawn: clipped tokens.",
    ):
        assert part in text, part
    assert "s – 0.75" in text
    assert "go on with" not in text


def test_held_out_rows_have_charts_with_errors_a_table_and_a_verdict(tmp_path: Path) -> None:
    make_run(tmp_path)
    sink = SqliteSink(tmp_path / "run.sqlite", first_step=5)
    sink.open()
    for message in (evaluated(0, 0.25), evaluated(4, 0.75), evaluated(0, name="once")):
        sink.write(message)
    sink.flush()
    sink.close()
    page = page_of(tmp_path)
    [chart] = [chart for chart in page.data["charts"] if chart["title"] == "held_out: avg@1"]
    [line] = chart["series"]
    assert (line["name"], line["y"], line["errors"], line["points"]) == ("avg@1", [0.25, 0.75], [0.1, 0.1], True)
    assert page.data["axes"][line["axes"]]["step"] == [0, 4]
    text = page.visible
    assert "From step 0 to 4: 0 rows better, 0 worse, 2 equal; no difference over 2 rows." in text
    assert "avg@1 0.25 ± 0.10 0.75 ± 0.10 0.75 ± 0.10 (step 4)" in text
    assert "held-out avg@1 0.75 ± 0.10 from 0.25 ± 0.10" in text
    assert "once" in page.within("h3")


def test_a_run_that_was_cut_off_says_how_to_go_on(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path)).visible
    assert "crashed" in text
    assert f"go on with: troupe train -o {tmp_path} --resume" in text


def test_starts_checkpoints_incidents_changes(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    tell(
        tmp_path,
        Incident(actor="scorer", kind="reward_timeout", message="the judge slept"),
        CheckpointWritten(version=2, folder=str(tmp_path), bytes=12_345_678, seconds=0.25),
        first_step=2,
    )
    (tmp_path / "changes.jsonl").write_bytes(b'{"step":1,"key":"learner.lr","value":1e-5}\n')
    page = page_of(tmp_path)
    text = page.visible
    assert "reward_timeout 1" in text
    assert "scorer reward_timeout the judge slept" in text
    assert f"12.3 MB 250 ms {tmp_path}" in text
    assert "2 learner.lr 1e-05" in text
    [mark] = page.data["marks"]
    assert (mark["step"], mark["time"], mark["tokens"]) == (2, 4.0, 200.0)
    assert mark["label"].startswith("start 2, ")


def write_hostile(folder: Path, text: str) -> None:
    """A run in which everything that others write is `text`."""
    make_run(folder, 0)
    (folder / "run.toml").write_bytes(
        RUN_TOML_WITH.replace(b"TEXT", json.dumps(text.encode("utf-8", "replace").decode()).encode())
    )
    sink = SqliteSink(folder / STORE, program="0.9", machine=text)
    sink.open()
    told = closed(1, 0)
    assert told.scored is not None
    group = told.scored.group
    prompt: PromptText = [{"role": text, "content": text}]
    rollouts = tuple(msgspec.structs.replace(rollout, text=text) for rollout in group.rollouts)
    changed = msgspec.structs.replace(
        group, rollouts=rollouts, prompt=msgspec.structs.replace(group.prompt, prompt=prompt, columns={"answer": text})
    )
    scored = msgspec.structs.replace(told.scored, group=changed, scores={text: told.scored.scores["r"]})
    sink.write(msgspec.structs.replace(told, scored=scored))
    sink.write(update(1, **{f"rewards/{text}/mean": 1.0, "rewards/b/mean": 0.0, text: 2.0, "reward": 1.0}))
    sink.write(Incident(actor=text, kind=text, message=text))
    sink.write(CheckpointWritten(version=1, folder=str(folder), bytes=1, seconds=0.5))
    sink.flush()
    sink.close()


RUN_TOML_WITH = b"[model]\npath = TEXT\n[rewards]\nfunctions = [TEXT]\n"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_others_wrote_is_only_text(tmp_path: Path, text: str) -> None:
    calm = make_run(tmp_path / "calm", 0)
    write_hostile(calm, "calm")
    write_hostile(tmp_path / "run", text)
    expected, page = page_of(calm), page_of(tmp_path / "run")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in expected.tags]
    names = [sorted(attributes) for _, attributes in page.tags]
    assert names == [sorted(attributes) for _, attributes in expected.tags]
    assert page.script == expected.script
    assert page.data["charts"][-1]["series"][0]["y"] == [2.0]


def write_hostile_episode(folder: Path, text: str) -> None:
    """A run with one conversation in which everything that anybody says is `text`."""
    make_run(folder, 0)
    call = ToolCall(name=text, arguments={text: [text]}, result=text, error=text, seconds=0.5)
    answer = Answer(
        said={"role": "assistant", "content": text, "reasoning_content": text},
        messages=({"role": text, "content": text}, {"role": "tool", "content": [{"type": "text", "text": text}]}),
        calls=(call,),
        info={text: text},
        failed=text,
        seconds=1.0,
    )
    rollout, episode = acted_rollout([answer, answer], text=text)
    episode = msgspec.structs.replace(episode, environment=text, attributes={text: text})
    told = closed(1, 0, (1.0,))
    assert told.scored is not None
    group = msgspec.structs.replace(told.scored.group, rollouts=(rollout,), episodes=(episode,))
    sink = SqliteSink(folder / STORE)
    sink.open()
    sink.write(msgspec.structs.replace(told, scored=msgspec.structs.replace(told.scored, group=group)))
    sink.write(update(1, **{f"tools/{text}/wait_s": 1.0, "turns/mean": 2.0}))
    sink.flush()
    sink.close()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_said_in_conversations_is_only_text(tmp_path: Path, text: str) -> None:
    write_hostile_episode(tmp_path / "calm", "calm")
    write_hostile_episode(tmp_path / "run", text)
    expected, page = page_of(tmp_path / "calm"), page_of(tmp_path / "run")
    assert [(tag, sorted(attributes)) for tag, attributes in page.tags] == [
        (tag, sorted(attributes)) for tag, attributes in expected.tags
    ]
    assert {tuple(sorted(a.items())) for _, a in page.tags if "class" in a} == {
        tuple(sorted(a.items())) for _, a in expected.tags if "class" in a
    }
    assert page.script == expected.script


def test_a_conversation_is_shown_turn_by_turn(tmp_path: Path) -> None:
    make_run(tmp_path, 0)
    sink = SqliteSink(tmp_path / STORE)
    sink.open()
    waits = {"environments/wait_s": 2.5, "tools/add/wait_s": 0.5, "tools/search/wait_s": 1.5, "time/device_s": 1.0}
    for step in (1, 2):
        sink.write(acted(step, 0))
        sink.write(update(step, **{"turns/mean": 3.0, "step_time": 4.0, **waits}))
    sink.flush()
    sink.close()
    page = page_of(tmp_path)
    heads = [text for text in page.within("b") if text.startswith("turn ")]
    assert heads[:6] == [f"turn {turn}" for turn in range(1, 7)]
    text = page.visible
    assert "library 6 turns 81 tokens 25 read waited 1.7 s ended by stop" in text
    assert "turn 2 12 tokens 5 read 6 ms open_book" in text
    assert page.within("code")[:2] == ['search {"query":"ابن سينا","limit":256}', 'open_book {"id":"bk-1072"}']
    assert f"{len(LONG_RESULT) - 6000:,} more characters" in text
    assert not any("open" in attributes for attributes in page.attributes("details"))
    waited = page.data["bars"]["waits"]
    assert [(row["name"], row["note"]) for row in waited] == [
        ("an episode", "2.5 s"),
        ("search, a call", "1.5 s"),
        ("add, a call", "500 ms"),
    ]
    [chart] = [chart for chart in page.data["charts"] if chart["title"] == "A call takes"]
    assert [one["name"] for one in chart["series"]] == ["add", "search"]


def test_a_completion_is_shown_as_it_is(tmp_path: Path) -> None:
    write_hostile(tmp_path, HOSTILE[0])
    page = page_of(tmp_path)
    shown = page.within("pre")
    assert shown.count(HOSTILE[0]) == 3  # best, worst, random
    assert shown.count(f"{HOSTILE[0]}: {HOSTILE[0]}") == 3  # the prompts


def test_control_characters_are_shown_as_escapes(tmp_path: Path) -> None:
    write_hostile(tmp_path, "a\x1b[31m\u202eb")
    page = page_of(tmp_path)
    assert r"a\x1b[31m\u202eb" in page.within("pre")
    assert "\x1b" not in page.visible
    assert "\u202e" not in page.visible


@pytest.mark.parametrize("text", HOSTILE[:7])
def test_data_ends_no_script(text: str) -> None:
    written = script_safe({text: [text, 1.5, None]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {text: [text, 1.5, None]}


def test_long_texts_are_cut(tmp_path: Path) -> None:
    write_hostile(tmp_path, "word " * 400_000)
    text = report_page(read_run(tmp_path), part_in(tmp_path))
    assert len(text) < 3_000_000
    assert "1,980,000 more characters" in text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text = report_page(read_run(make_run(tmp_path)), part_in(tmp_path))
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search("https?:", text)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket", text)


def test_only_our_script_may_run(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    [policy] = [a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_a_run_of_a_hundred_thousand_steps_makes_a_small_page(tmp_path: Path) -> None:
    make_run(tmp_path, 0)
    parts = [
        msgspec.json.encode({**metrics_of(step), **{f"rewards/r{i}/mean": 1 / (step + i) for i in range(12)}})
        for step in range(1, 101)
    ]
    with (tmp_path / "metrics.jsonl").open("wb") as file:  # as many points as a longer run has
        for step in range(1, 1001):
            file.write(b'{"step":%d,' % step + parts[step % 100][1:] + b"\n")
    text = report_page(read_run(tmp_path), part_in(tmp_path))
    assert len(Page(text).data["axes"][0]["step"]) == 1000
    assert len(text) < 1_500_000


@pytest.mark.parametrize("store", [True, False])
def test_a_run_without_a_step_has_a_page(tmp_path: Path, store: bool) -> None:
    make_run(tmp_path, 0)
    if store:
        SqliteSink(tmp_path / STORE).open()
    page = page_of(tmp_path)
    assert page.data["charts"] == []
    assert "No step is done yet" in page.visible


def test_who_did_the_work_elsewhere_is_told_as_text(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    assert "Who did the work" not in report_page(read_run(tmp_path))
    odd = msgspec.structs.replace(LAPTOP, name="<i>odd</i>", detail="{{ 7 }}", state="lost", leases=())
    sink = SqliteSink(tmp_path / STORE, first_step=2, clock=Clock(1_700_000_000.0))
    sink.open()
    for members in ((LAPTOP, odd, ALONE), (LAPTOP, odd, ALONE)):
        sink.write(status(members=members))
        sink.flush()
    sink.close()
    told = read_run(tmp_path).stored.members
    assert [(one.name, one.tokens > 0) for one in told] == [
        ("<i>odd</i>", False),
        ("generator 1", True),
        ("laptop", True),
    ]
    page = report_page(read_run(tmp_path))
    assert "Who did the work" in page
    assert "&lt;i&gt;odd&lt;/i&gt;" in page
    assert "lost: {{ 7 }}" in page
    assert "<i>odd" not in page
