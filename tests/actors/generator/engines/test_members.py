"""External engines as members of a crew, against a server that fails in every way that it is told to."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx
import pytest

from tests.support.fake_engine import FakeServer, with_choice
from tests.support.fakes import Reports, device_thread, make_prompt
from tests.support.tiny import CONFIG, write_tiny_model
from troupe.actors.generator.crew import Crew
from troupe.actors.generator.engines.dialects import Dialect, EngineWay, MlxLmDialect, VllmDialect
from troupe.actors.generator.engines.folders import EngineFolders
from troupe.actors.generator.engines.members import EngineMembers
from troupe.actors.generator.engines.server import EngineServer, Sampling
from troupe.actors.generator.engines.settings import EngineConfig
from troupe.actors.generator.parts import parts_of
from troupe.errors import RunError
from troupe.messages import RolloutGroup
from troupe.policy import GenerationConfig, Tokenizer, Weights
from troupe.policy.decode.stopping import StopRules
from troupe.runtime.board import PolicyBoard
from troupe.runtime.http_client import HttpClient

LENGTH, G = 6, 2
PROBES = 1  # requests before the first prompt, where nothing has to be found out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("engine")))


class Faults(deque[Any]):
    """As many faults as are asked for: one of five completions has one."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__([None])
        self._dice = dice

    def popleft(self) -> Any:
        return self._dice.choice([500, 429, "cut", "half", "hang"]) if self._dice.random() < 0.2 else None


class Bench:
    """A crew whose members are engines, and what came of it."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.groups: list[RolloutGroup] = []
        self.reports = Reports()
        self.board: PolicyBoard[Weights] = PolicyBoard(0)
        self.publish(0)
        self.crew = Crew(self._hand_over, board=self.board, report=self.reports.reporter("generator"), pinned=False)
        self.tokenizer = tokenizer
        self.own = -1.0
        self.key: str | None = None

    def publish(self, version: int) -> None:
        weights = {"w": mx.full(2, version)}
        mx.eval(weights)
        self.board.publish(version, weights)

    async def _hand_over(self, group: RolloutGroup) -> None:
        self.groups.append(group)

    def server(self, fake: FakeServer, way: EngineWay = "none", **settings: Any) -> EngineServer:
        generation = GenerationConfig(num_generations=G, max_completion_length=LENGTH, **settings.pop("generation", {}))
        config = EngineConfig(url=fake.url, **{"kind": "vllm", "most": 2, "timeout_s": 5.0, **settings})
        client = HttpClient(config.base_url, timeout_s=config.timeout_s, key=self.key)
        dialect: Dialect = VllmDialect(client, "base", run=str(self.folder), stop_ids=[256], seed=0)
        if config.kind == "mlx-lm":
            dialect = MlxLmDialect("base", self.tokenizer)
        rules = StopRules(frozenset([256]))
        sampling = Sampling(generation=generation, rules=rules, vocab_size=CONFIG.vocab_size, tokenizer=self.tokenizer)
        return EngineServer(config, client, dialect, way, sampling, "base", first_pause_s=0.01)

    @asynccontextmanager
    async def working(self, *servers: EngineServer) -> AsyncIterator[EngineMembers]:
        def save(path: Path, weights: Weights) -> None:
            path.mkdir()
            (path / "w").write_text(str(weights["w"].tolist()))

        folders = EngineFolders(self.folder, save, size_of=lambda weights: 100, shared_memory=self.folder / "none")
        members = EngineMembers(
            servers,
            folders={None: folders},
            device=device_thread("generator"),
            probe_ids=(65, 66),
            own_log_probs=lambda weights, prompt, ids: [self.own - 0.04 * float(weights["w"][0])] * len(ids),
            first_pause_s=0.02,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(members.run, self.crew)
            tasks.start_soon(self.crew.watch)
            yield members
            tasks.cancel_scope.cancel()

    def submit(self, *steps: int, places: int = 2) -> None:
        for step in steps or (0,):
            for part in parts_of([make_prompt(step, place) for place in range(places)], None, None):
                self.crew.submit(part)

    async def until(self, groups: int) -> None:
        await until(lambda: len(self.groups) >= groups)


async def until(holds: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not holds():  # noqa: ASYNC110 - what is waited for tells nobody
            await anyio.sleep(0.01)


@pytest.fixture
def bench(tmp_path: Path, tokenizer: Tokenizer) -> Bench:
    return Bench(tmp_path, tokenizer)


pytestmark = pytest.mark.anyio


async def test_prompts_go_as_ids_and_come_back_as_groups_with_ids_log_probs_and_versions(bench: Bench) -> None:
    async with FakeServer().running() as fake, bench.working(bench.server(fake, most=2)):
        bench.submit(0, 1, 2)
        await bench.until(6)
    assert sorted(group.prompt.gid for group in bench.groups) == list(range(6))
    asked = fake.asked[PROBES + 1 :]  # another one compares log-probs
    assert [tuple(body["prompt"]) for body in asked] == [make_prompt(n // 2, n % 2).prompt_ids for n in range(6)]
    assert {(body["n"], body["max_tokens"], body["top_k"], body["ignore_eos"]) for body in asked} == {(2, 6, -1, True)}
    assert len({body["seed"] for body in asked}) == 6
    assert fake.most_at_once == 2
    for group in bench.groups:
        assert len(group.rollouts) == G
        for rollout in group.rollouts:
            assert len(rollout.token_ids) == LENGTH
            assert rollout.finish_reason == "length"
            assert rollout.log_probs == rollout.sampling_log_probs == (-1.0,) * LENGTH
            assert rollout.versions == (0,) * LENGTH
            assert rollout.text == bench.tokenizer.decode(rollout.token_ids)


async def test_a_completion_ends_where_ours_would(bench: Bench) -> None:
    async with FakeServer(vocab_size=257).running() as fake, bench.working(bench.server(fake)):
        fake.end_id = 256
        fake.change = lambda answer: (
            with_choice(  # a server that reads on past an end
                token_ids=[70, 256, 71, 72, 73, 74], logprobs={"token_logprobs": [-1.0] * 6}
            )(answer)
            if len(answer["choices"]) == G
            else answer
        )
        bench.submit(places=1)
        await bench.until(1)
    first, second = bench.groups[0].rollouts
    assert (first.token_ids, first.finish_reason) == ((70, 256), "stop")
    assert (second.token_ids[-1], len(second.token_ids), second.finish_reason) == (256, 3, "stop")


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no ids": (
        with_choice(token_ids=None, logprobs={"tokens": ["a"] * 6, "token_logprobs": [-1.0] * 6}),
        "no token ids",
    ),
    "no log-probs": (with_choice(logprobs=None), "no log-probs"),
    "lengths": (with_choice(logprobs={"token_logprobs": [-1.0] * 5}), "6 token ids and 5 log-probs"),
    "too long": (with_choice(token_ids=[40] * 9, logprobs={"token_logprobs": [-1.0] * 9}), "gave 9 tokens"),
    "outside": (with_choice(token_ids=[999] * 6), "the token 999"),
    "above 0": (with_choice(logprobs={"token_logprobs": [0.5] * 6}), "log-prob 0.5"),
    "null": (with_choice(logprobs={"token_logprobs": [None] * 6}), "no log-probs"),
    "another prompt": (with_choice(prompt_token_ids=[1, 2]), "read another prompt"),
    "fewer": (lambda answer: {**answer, "choices": []}, "0 completions where 1"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_server_that_cannot_serve_ends_the_run_with_the_reason(bench: Bench, case: str) -> None:
    change, reason = REFUSED[case]
    async with FakeServer().running() as fake:
        fake.change = change
        with pytest.RaisesGroup(pytest.RaisesExc(RunError, match=reason), flatten_subgroups=True):
            async with bench.working(bench.server(fake)):
                bench.submit()
                await bench.until(1)
    assert not bench.groups


async def test_another_model_is_refused_by_its_log_probs(bench: Bench) -> None:
    bench.own = -3.5
    async with FakeServer().running() as fake:
        with pytest.RaisesGroup(pytest.RaisesExc(RunError, match="2.5 nats a token"), flatten_subgroups=True):
            async with bench.working(bench.server(fake)):
                await bench.until(1)


@pytest.mark.parametrize(
    ("certain", "generation", "reason"),
    [
        (False, {"temperature": 0.7}, "before the temperature"),
        (True, {"temperature": 0.7}, None),
        (True, {"top_k": 5}, "after top_k"),
        (False, {"top_k": 5}, None),
        (True, {"temperature": 0.7, "top_p": 0.9}, "after top_k"),
    ],
)
async def test_which_log_probs_a_server_gives_is_found_out(
    bench: Bench, certain: bool, generation: dict[str, Any], reason: str | None
) -> None:
    """`certain`: after top_k = 1 its log-probs are 0, so they are those after filters and temperature."""
    async with FakeServer().running() as fake:
        asked = fake.asked

        def change(answer: dict[str, Any]) -> dict[str, Any]:
            if asked[-1]["top_k"] == 1 and certain:
                answer["choices"][0]["logprobs"]["token_logprobs"] = [0.0] * LENGTH
            return answer

        fake.change = change
        if reason is None:
            async with bench.working(bench.server(fake, generation=generation)):
                bench.submit(places=1)
                await bench.until(1)
        else:
            with pytest.RaisesGroup(pytest.RaisesExc(RunError, match=reason), flatten_subgroups=True):
                async with bench.working(bench.server(fake, generation=generation)):
                    await bench.until(1)


@pytest.mark.parametrize("fault", [500, 429, "cut", "half"])
async def test_a_fault_that_passes_costs_another_request_and_no_group(bench: Bench, fault: Any) -> None:
    async with FakeServer().running() as fake, bench.working(bench.server(fake)):
        await bench.until(0)
        fake.faults += [None, None, fault, None, fault]
        bench.submit(0, 1)
        await bench.until(4)
    assert sorted(group.prompt.gid for group in bench.groups) == [0, 1, 2, 3]
    assert not await bench.reports.incidents()


async def test_an_engine_that_goes_away_gives_back_what_it_has_and_comes_back(bench: Bench) -> None:
    async with (
        FakeServer().running() as one,
        FakeServer().running() as other,
        bench.working(bench.server(one), bench.server(other)) as members,
    ):
        one.faults += [None, None, *["hang"] * 2]
        bench.submit(places=6)
        await bench.until(4)
        assert [status.state for status in members.statuses()] == ["working", "idle"]
        async with one.stopped():
            await bench.until(6)
            lost = members.statuses()[0]
            assert lost.state == "lost"
            assert not lost.leases
        await until(lambda: members.statuses()[0].state == "idle")
    kinds = [incident.kind for incident in await bench.reports.incidents()]
    assert kinds == ["engine_lost", "engine_back"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
async def test_whatever_engines_do_every_group_comes_once(bench: Bench, seed: int) -> None:
    dice = random.Random(seed)
    wrong = with_choice(token_ids=[40], logprobs={"token_logprobs": [-1.0]})

    def faulty(fake: FakeServer) -> None:
        fake.faults = Faults(dice)
        fake.change = lambda answer: wrong(answer) if dice.random() < 0.02 else answer

    async with (
        FakeServer().running() as one,
        FakeServer().running() as other,
        bench.working(bench.server(one, "adapter", timeout_s=0.2), bench.server(other, "reload", timeout_s=0.2)),
    ):
        bench.submit(0)
        await bench.until(2)
        faulty(one)
        faulty(other)
        for step in range(1, 16):
            bench.publish(step)
            bench.submit(step)
            if step == 8:
                async with one.stopped():
                    await anyio.sleep(0.05)
            await anyio.sleep(0.02)
        await bench.until(32)
        await anyio.sleep(0.05)
    assert sorted(group.prompt.gid for group in bench.groups) == list(range(32))
    for group in bench.groups:
        [version] = {version for rollout in group.rollouts for version in rollout.versions}
        assert version >= group.prompt.slot.step  # the newest when it was begun, and its step came with a version


async def test_a_prompt_that_no_answer_comes_to_ends_the_run_by_name(bench: Bench) -> None:
    async with FakeServer().running() as fake:
        fake.change = lambda answer: with_choice(token_ids=[40, 41, 42], logprobs={"token_logprobs": [-1.0] * 3})(
            answer
        )
        with pytest.RaisesGroup(
            pytest.RaisesExc(RunError, match=r"part 0\.0\.0.*3 of 6 tokens with the token 42"), flatten_subgroups=True
        ):
            async with bench.working(bench.server(fake)):
                bench.submit(places=1)
                await bench.until(1)


async def test_an_adapter_is_loaded_by_name_for_each_version_and_forgotten_when_nothing_uses_it(bench: Bench) -> None:
    async with FakeServer().running() as fake, bench.working(bench.server(fake, "adapter", most=1)) as members:
        ours = hashlib.sha256(str(bench.folder).encode()).hexdigest()[:8]
        fake.adapters |= {"troupe-deadbeef-3", "others", f"troupe-{ours}-99"}  # the last, of a start that was killed
        bench.submit()
        await bench.until(2)
        bench.publish(1)
        held = {path.name for path in bench.folder.glob("troupe-weights-*/*")}
        bench.submit(1)
        await bench.until(4)
        assert {path.name for path in bench.folder.glob("troupe-weights-*/*")} == {"00000001"}
        assert held == {"00000000"}
        names = [body["lora_name"] for path, body in fake.told if path.endswith("/load_lora_adapter")]
        assert [name.rpartition("-")[2] for name in names] == ["0", "1"]
        assert fake.adapters == {names[1], "others", "troupe-deadbeef-3"}  # another run's stay
        async with fake.stopped():  # it forgets all
            pass
        bench.submit(2, places=1)
        await bench.until(5)
        await members.finish()
        assert fake.adapters == set()
    assert [group.rollouts[0].versions[0] for group in bench.groups] == [0, 0, 1, 1, 1]
    assert not list(bench.folder.glob("troupe-weights-*"))


async def test_an_engine_that_goes_on_with_the_first_adapter_is_found_out(bench: Bench) -> None:
    """Its log-probs stay near those of version 0, while ours move away."""
    async with FakeServer().running() as fake, bench.working(bench.server(fake, "adapter")) as members:
        bench.submit(places=1)
        await bench.until(1)
        bench.publish(5)
        bench.submit(1, places=1)
        await until(lambda: members.statuses()[0].state == "refused" or len(bench.groups) > 1)
        assert len(bench.groups) == 2  # not looked at yet
        bench.publish(12)
        bench.submit(2, places=1)
        await until(lambda: members.statuses()[0].state == "refused")
        assert "new adapters do not reach it" in members.statuses()[0].detail
    assert len(bench.groups) == 2


async def test_whole_weights_are_reloaded_when_nothing_is_under_way(bench: Bench) -> None:
    async with FakeServer().running() as fake, bench.working(bench.server(fake, "reload", most=2)):
        bench.submit(0, 1)
        await bench.until(2)
        bench.publish(1)
        await bench.until(4)
        bench.submit(9, places=1)
        await bench.until(5)
    assert [path for path, _ in fake.told] == ["/collective_rpc", "/reset_prefix_cache"] * 2
    assert fake.told[2][1]["method"] == "reload_weights"
    assert bench.groups[-1].rollouts[0].versions[0] == 1


async def test_mlx_lm_gets_text_that_reads_as_the_same_ids_and_a_request_a_sample(bench: Bench) -> None:
    def as_mlx_lm(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        entries = [{"id": id_, "logprob": -1.0} for id_ in choice.pop("token_ids")]
        del choice["prompt_token_ids"]
        choice["logprobs"] = {"content": entries}
        return answer

    async with FakeServer().running() as fake, bench.working(bench.server(fake, "reload", kind="mlx-lm")):
        fake.change = as_mlx_lm
        bench.submit(places=1)
        await bench.until(1)
    assert [body["prompt"] for body in fake.asked[2:]] == ["AB"] * G
    assert all(Path(body["model"]).name == "00000000" for body in fake.asked[1:])
    assert not any("n" in body or "seed" in body for body in fake.asked)
    assert len({rollout.token_ids for rollout in bench.groups[0].rollouts}) == G


async def test_the_key_goes_in_a_header_and_into_no_message(bench: Bench) -> None:
    async with FakeServer().running() as fake:
        fake.faults.append(401)
        bench.key = "s3cret"
        with pytest.RaisesGroup(pytest.RaisesExc(RunError, match="401"), flatten_subgroups=True) as caught:
            async with bench.working(bench.server(fake)):
                await bench.until(1)
    assert fake.headers[0]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(caught.value.exceptions)
