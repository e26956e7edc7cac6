"""`troupe generate`: plain text and chats, streamed, in numbers or as JSON; what is refused with exit code 2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from troupe.cli.generate import tell_as_it_comes
from troupe.cli.main import main
from troupe.policy import Policy, load_policy

FLAGS = ("-m", "m", "--max-new-tokens", "12", "--seed", "5")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model `m`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "m")
    return tmp_path


def call(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ("generate", *arguments), input=text)


def done(*arguments: str, text: str | None = None) -> str:
    """What a call that must succeed prints."""
    result = call(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str, text: str | bytes | None = None) -> str:
    """The message of a call that must exit with 2 and print nothing else."""
    result = call(*arguments, text=text)
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr


def test_the_text_is_that_of_generate_text() -> None:
    expected = load_policy("m").generate_text("abc", 12, 0.8, 0.95, seed=5)
    assert done(*FLAGS, "-p", "abc") == expected + "\n"
    assert done(*FLAGS, "-p", "-", text="abc") == expected + "\n"
    assert done(*FLAGS, "-p", "abc", "--dtype", "float32") == expected + "\n"


def test_text_is_printed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    def parts() -> Iterator[str]:
        for part in ("one", " two", " é"):
            yield part
            assert capsys.readouterr().out == part, "a part is printed before the next is asked for"

    tell_as_it_comes(parts(), raw=True)
    assert capsys.readouterr().out == "\n"


def test_a_chat_is_the_template_s_prompt() -> None:
    policy = load_policy("m")
    for flags, prompt in (
        ([], "[user]Hi[assistant]"),
        (["--system", "Be kind."], "[system]Be kind.[user]Hi[assistant]"),
        (["--no-thinking"], "[user]Hi[assistant]"),
    ):
        expected = policy.generate_text(prompt, 12, 0.8, 0.95, seed=5)
        assert done(*FLAGS, "--chat", *flags, "-p", "Hi") == expected + "\n"


def test_no_thinking_reaches_the_template(workplace: Path) -> None:
    (workplace / "m" / "chat_template.jinja").write_text(
        "{{ messages[-1].content }}{{ '!' if enable_thinking is defined and not enable_thinking else '?' }}"
    )
    policy = load_policy("m")
    for flags, prompt in (((), "Hi?"), (("--no-thinking",), "Hi!")):
        assert done(*FLAGS, "--chat", *flags, "-p", "Hi") == policy.generate_text(prompt, 12, seed=5) + "\n"


def test_json_tells_what_was_done() -> None:
    line = done(*FLAGS, "-p", "abc", "--json", "--top-k", "30")
    assert line.count("\n") == 1
    told = json.loads(line)
    policy: Policy = load_policy("m")
    assert told.pop("tokens_per_s") > 0
    completion = policy.generate_text("abc", 12, 0.8, 0.95, 30, seed=5)
    assert told == {
        "prompt": "abc",
        "completion": completion,
        "prompt_tokens": 3,
        "completion_tokens": 12,
        "finish_reason": "length",
        "seed": 5,
    }


def test_a_seed_that_was_drawn_is_told_and_draws_the_same_again() -> None:
    flags = ("-m", "m", "-p", "abc", "--max-new-tokens", "12", "--json")
    told = json.loads(done(*flags))
    assert json.loads(done(*flags, "--seed", str(told["seed"])))["completion"] == told["completion"]


def test_many_samples() -> None:
    told = [json.loads(line) for line in done(*FLAGS, "-p", "abc", "-n", "3", "--json").splitlines()]
    texts = [one["completion"] for one in told]
    assert len(set(texts)) == 3
    headed = "".join(f"# sample {number} of 3\n{text}\n" for number, text in enumerate(texts, 1))
    assert done(*FLAGS, "-p", "abc", "-n", "3") == headed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-m", "gone", "-p", "a"), "gone: no such model folder"),
        (("-m", "Some/Gone", "-p", "a"), "Some/Gone: no such folder here, and the model of this name is not in"),
        (("-m", "m", "-p", ""), "its prompt is empty"),
        (("-m", "m", "-p", "x" * 100), "leaves no room"),
        (("-m", "m", "-p", "x" * 100, "--json"), "leaves no room"),
        (("-m", "m", "-p", "a\udcff"), "is no Unicode text"),
        (("-m", "m", "-p", "a", "--system", "s"), "add --chat"),
        (("-m", "m", "-p", "a", "--no-thinking"), "add --chat"),
        (("-m", "m", "-p", "a", "-n", "0"), "-n"),
        (("-m", "m", "-p", "a", "--temperature", "nan"), "--temperature"),
        (("-m", "m", "-p", "a", "--top-p", "0"), "--top-p"),
        (("-m", "m"), "--prompt"),
        (("-p", "a", "--chat"), "no chat template"),
    ],
)
def test_bad_input_exits_with_2(
    flags: tuple[str, ...], message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(workplace / "cache"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert message in refused(*flags)


def test_standard_input_that_is_no_text_is_refused() -> None:
    assert "its character 1 is no Unicode text" in refused("-m", "m", "-p", "-", text=b"a\xff")
