from __future__ import annotations

import math
import socket
import urllib.error
import urllib.request
from contextlib import closing

import pytest

from tests.records.sinks.oracles import package
from tests.records.sinks.steps import evaluated, status, update
from troupe.messages import NOT_STARTED, Incident, LiveGroup, Restarting, Slot
from troupe.records.sinks.prometheus import PrometheusSink, exposition

GROUPS = tuple(
    LiveGroup(gid=i, slot=Slot(step=0, place=i), owner=owner, waiting=waiting, age_s=10.0 - i)
    for i, (owner, waiting) in enumerate([("learner", False), ("scorer", True), ("scorer", True)])
)
STATUS = status(
    "held",
    step=3,
    total_steps=9,
    policy_version=3,
    groups=GROUPS,
    queues={"scored": 2, "prompts": 0},
    held=("the judge is down",),
    rewards_down={'judge "A"\n\\': "refused"},
    restarts={"scorer": 2},
    incidents={"reward_timeout": 5},
    metrics={
        "reward": 0.5,
        "rewards/exact/mean": 0.25,
        "rewards/exact/std": 0.125,
        "rewards/a/b/mean": 1.0,
        "completions/mean_length": 7.5,
        "clip_ratio/low_min": math.nan,
        "queue/scored/depth": 99.0,
        "queue/scored/wait_s": 1.5,
        "time/learner/busy": 0.75,
        "time/reward/hidden_s": 2.0,
        "time/environment/exposed_s": 0.5,
        "environments/my library/wait_s": 3.5,
        "environments/wait_s": 4.5,
        "tools/search/wait_s": 1.25,
        "tools/failure_frequency": 0.25,
        "my metric: größe!": -1.5,
        "step": 77.0,
        "huge": math.inf,
        "incidents_total": 4.0,
    },
    restarting=Restarting(attempt=2, limit=5, next_try_s=0.0, reason="killed"),
)
PAGE = exposition(STATUS)


def sample(line: str) -> str:
    [found] = [text for text in PAGE.splitlines() if text.startswith(f"{line} ")]
    return found.removeprefix(f"{line} ")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("troupe_step", "3.0"),  # and not 77: a reward may call its metrics anything
        ("troupe_total_steps", "9.0"),
        ("troupe_policy_version", "3.0"),
        ('troupe_phase{phase="held"}', "1.0"),
        ('troupe_phase{phase="running"}', "0.0"),
        ("troupe_held", "1.0"),
        ("troupe_groups_alive", "3.0"),
        ('troupe_groups{owner="scorer",waiting="true"}', "2.0"),
        ("troupe_oldest_group_age_seconds", "10.0"),
        ('troupe_queue_depth{queue="scored"}', "2.0"),
        ('troupe_queue_wait_s{queue="scored"}', "1.5"),
        ('troupe_reward_down{reward="judge \\"A\\"\\n\\\\"}', "1.0"),
        ('troupe_incidents_total{kind="reward_timeout"}', "5.0"),
        ('troupe_actor_restarts_total{actor="scorer"}', "2.0"),
        ("troupe_restart_attempt", "2.0"),
        ("troupe_reward", "0.5"),
        ('troupe_reward_function_mean{reward="exact"}', "0.25"),
        ('troupe_reward_function_std{reward="exact"}', "0.125"),
        ('troupe_reward_function_mean{reward="a/b"}', "1.0"),
        ("troupe_completions_mean_length", "7.5"),
        ("troupe_clip_ratio_low_min", "NaN"),
        ('troupe_actor_busy{actor="learner"}', "0.75"),
        ('troupe_time_hidden_s{work="reward"}', "2.0"),
        ('troupe_time_exposed_s{work="environment"}', "0.5"),
        ('troupe_environment_wait_s{environment="my library"}', "3.5"),
        ("troupe_environments_wait_s", "4.5"),
        ('troupe_tool_wait_s{tool="search"}', "1.25"),
        ("troupe_tools_failure_frequency", "0.25"),
        ("troupe_my_metric_gr_e", "-1.5"),
        ("troupe_huge", "+Inf"),
    ],
)
def test_a_status_is_a_page_of_samples(line: str, value: str) -> None:
    assert sample(line) == value


def test_a_run_that_has_not_begun_has_a_page_too() -> None:
    page = exposition(NOT_STARTED)
    assert 'troupe_phase{phase="starting"} 1.0' in page
    assert page.endswith("\n")


def test_the_format_is_the_one_that_prometheus_reads() -> None:
    parser = package("prometheus_client.parser")
    families = {family.name: family for family in parser.text_string_to_metric_families(PAGE)}
    assert families["troupe_reward"].samples[0].value == 0.5
    assert families["troupe_incidents"].type == "counter"
    assert families["troupe_incidents"].samples[0].labels == {"kind": "reward_timeout"}
    assert families["troupe_reward_down"].samples[0].labels == {"reward": 'judge "A"\n\\'}
    samples = [(s.name, tuple(sorted(s.labels.items()))) for family in families.values() for s in family.samples]
    assert len(samples) == len(set(samples))


def fetched(port: int, path: str = "/metrics") -> tuple[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
        return response.headers["Content-Type"], response.read().decode()


def test_the_sink_serves_what_the_newest_messages_say() -> None:
    sink = PrometheusSink(0)
    sink.close()
    sink.open()
    try:
        kind, page = fetched(sink.port)
        assert kind.startswith("text/plain; version=0.0.4")
        assert "troupe_step 0.0" in page
        sink.write(Incident(actor="scorer", kind="odd", message="late"))
        sink.write(update(2, {"reward": 0.5, "queue/scored/depth": 3.0}, total_steps=7))
        sink.flush()
        page = fetched(sink.port, "/metrics?x=1")[1]
        for line in (
            "troupe_step 2.0",
            "troupe_total_steps 7.0",
            "troupe_reward 0.5",
            'troupe_queue_depth{queue="scored"} 3.0',
            'troupe_incidents_total{kind="odd"} 1.0',
            'troupe_phase{phase="running"} 1.0',
        ):
            assert line in page
        sink.write(status("paused", step=3, total_steps=7, queues={"scored": 1}, incidents={"odd": 4, "late": 1}))
        sink.flush()
        page = fetched(sink.port)[1]
        for line in (
            "troupe_step 3.0",
            "troupe_reward 0.5",
            'troupe_queue_depth{queue="scored"} 1.0',
            'troupe_incidents_total{kind="odd"} 4.0',
            'troupe_incidents_total{kind="late"} 1.0',
            'troupe_phase{phase="paused"} 1.0',
        ):
            assert line in page
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetched(sink.port, "/")
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", data=b"", timeout=10)
    finally:
        sink.close()
        sink.close()
    with pytest.raises(OSError, match="refused"):
        fetched(sink.port)


def test_a_port_that_is_taken_is_the_sinks_own_failure() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            PrometheusSink(taken.getsockname()[1]).open()


def test_the_newest_evaluation_of_each_set_is_told() -> None:
    sink = PrometheusSink(0)
    for message in (evaluated(0, 0.25), evaluated(8, 0.5), evaluated(8, 1.0, "math")):
        sink.write(message)
    sink.flush()
    lines = exposition(sink._status).splitlines()
    assert 'troupe_evaluation{set="held_out",figure="avg@1"} 0.5' in lines
    assert 'troupe_evaluation{set="math",figure="avg@1"} 1.0' in lines
    assert 'troupe_evaluation_version{set="held_out"} 8.0' in lines
