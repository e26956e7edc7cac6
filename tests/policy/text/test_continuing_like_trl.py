"""What is put behind a call of a tool, against TRL 1.16, for the chat templates that it ships."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.policy.text.test_added_tokens import folder_of, token
from tests.support.extras import extra
from troupe.policy.text.continuing import Continuer
from troupe.policy.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ENDS = {
    **dict.fromkeys(("gemma4_v2", "gemma4_v5"), "<eos>"),
    **dict.fromkeys(("llama3_1", "llama3_2"), "<|eot_id|>"),
    **dict.fromkeys(("gptoss", "gptoss_training"), "<|call|>"),
    **dict.fromkeys(("glm4moe", "glm4moe_training"), "<|endoftext|>"),
    **dict.fromkeys(("muse_glimmer", "muse_glimmer_training"), "<|eot|>"),
    **dict.fromkeys(
        ("qwen2_5", "qwen3_training", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"), "<|im_end|>"
    ),
    **dict.fromkeys(("qwen3_instruct_2507", "lfm2_v2", "nemotron_3_nano", "nemotron_3_ultra"), "<|im_end|>"),
}
"""Template → what the tokenizer of its models calls the end. Qwen3's own template is none that TRL can go on with."""
TURN_ENDS = ("<turn|>", "<|tool_response>")
"""What Gemma 4 ends turns with, which is not its `eos_token`."""

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "City"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}}
RESULTS = [
    "sunny",
    "",
    " \n two\n\nlines \t",
    '{"a": "q", \'b\': 1}',
    "22 °C é中🙂 \\n",
    "<b>x<y>z</b>",
    "{'error': 'none'}",
]


def tokenizer_folder(folder: Path, template: str, end: str) -> Path:
    """A tokenizer that has all that the template writes between angle brackets as tokens."""
    names = set(re.findall(r"<[|｜]?[A-Za-z_/][^<>\s'\":{}]{0,40}>|<\|[a-z_]+>|<[a-z_]+\|>", template)) | {end, "<bos>"}
    held = [token(name, special=not re.fullmatch(r"</?[a-z_]+>", name)) for name in sorted(names)]
    config = {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    return folder_of(folder, {**config, "eos_token": end, "pad_token": end, "bos_token": "<bos>"}, held)


@pytest.mark.parametrize("name", ENDS)
def test_results_of_tools_are_put_behind_calls_as_trl_does(tmp_path: Path, name: str) -> None:
    trl, transformers = pytest.importorskip("trl"), extra("transformers")
    template = (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    folder = tokenizer_folder(tmp_path, template, ENDS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = SimpleNamespace(
        _is_vlm=False, processing_class=theirs, _tokenizer=theirs, chat_template=None, chat_template_kwargs={}
    )
    ours = Tokenizer.from_pretrained(folder)
    ends = [ours.added_tokens[end] for end in TURN_ENDS if end in ours.added_tokens]
    continuer = Continuer(ours, tools=[TOOL], history="keep", end_ids=ends)
    continuer.check(by_tool=True, by_user=False)
    sampled = (72, 105, ends[-1] if name == "gemma4_v5" else ends[0] if ends else ours.added_tokens[ENDS[name]])
    for count in (1, 2, 3):
        for start in range(len(RESULTS) - count):
            results = RESULTS[start : start + count]
            new = [{"role": "tool", "name": "weather", "content": result} for result in results]
            calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": c}}} for c in results]
            said: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
            expected = trl.GRPOTrainer._get_tool_suffix_ids(trainer, new)
            following = continuer.following([{"role": "user", "content": "Hello"}], said, sampled, new)
            if name == "gemma4_v2":  # TRL leaves out the line end behind an end that is not `eos_token`
                expected = [*ours.encode("\n"), *expected]
            assert list(following.ids) == expected, json.dumps(results)
            assert following.prompt_ids is None
