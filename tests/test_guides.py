"""The guides of both stages do what they say: their commands and scripts run, in their order.

What they presuppose, a teacher, a tagger, two students and a few files, is made here from tiny
models; every `sh` block is run command by command, every `python` block as a script.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from shared.options import main
from student_train import cli as student_cli
from teacher_cache import cli as teacher_cli
from tests.conftest import WORDS, llama_config
from tests.output_caches import make_tokenizer

ROOT = Path(__file__).parents[1]
GUIDES = (ROOT / "teacher_cache" / "README.md", ROOT / "student_train" / "README.md")
APPS = {"cache-teacher": teacher_cli.app, "train-student": student_cli.app}
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TAGS = ("O", "B-word", "I-word")


def blocks(guide: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)


def steps() -> list[tuple[str, str]]:
    """(language, code) of everything that the guides show, stage one first, as it stands there."""
    found = []
    for guide in GUIDES:
        pattern = r"^```(sh|python)\n(.*?)^```"
        found += re.findall(pattern, guide.read_text(), re.MULTILINE | re.DOTALL)
    return found


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(start: int, count: int) -> list[str]:
    return [WORDS[(start * 7 + 3 * index) % len(WORDS)] for index in range(count)]


@pytest.fixture
def workplace(tmp_path, monkeypatch, teacher_dir, student_config_dir):
    """A folder with all that the guides name, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher_dir, "teacher")
    Path("teacher/chat_template.jinja").write_text(CHAT)
    shutil.copytree(student_config_dir, "student")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        id2label=dict(enumerate(TAGS)),
    )
    BertForTokenClassification(config).save_pretrained("tagger")
    make_tokenizer().save_pretrained("tagger")
    config.save_pretrained("tag-student")
    for name, first in (("text", 0), ("held-out", 500)):
        rows = [{"text": " ".join(words(first + i, 12 + i % 9))} for i in range(40)]
        write_lines(Path(f"{name}.jsonl"), rows)
    chats = [
        {
            "messages": [
                {"role": "user", "content": " ".join(words(i, 4))},
                {"role": "assistant", "content": " ".join(words(i + 1, 5))},
            ]
        }
        for i in range(12)
    ]
    write_lines(Path("chat.jsonl"), chats)
    tagged = [
        {"tokens": words(i, 6), "tags": [TAGS[(i + j) % 3] for j in range(6)]} for i in range(20)
    ]
    write_lines(Path("tagged.jsonl"), tagged)
    write_lines(Path("words.jsonl"), [{"tokens": words(i + 100, 6)} for i in range(20)])
    assert llama_config().vocab_size == 300  # of both models above
    return tmp_path


def run_command(line: str) -> None:
    command, *arguments = shlex.split(line)
    with pytest.raises(SystemExit) as ended:
        main(APPS[command], arguments)
    assert ended.value.code == 0, line


def test_the_guides_do_what_they_say(workplace):
    for language, code in steps():
        if language == "python":
            exec(compile(code, "guide", "exec"), {})
            continue
        for line in code.strip().splitlines():
            run_command(line)
    assert Path("ready-to-serve/model.safetensors").is_file()
    assert Path("page.html").is_file()


def test_both_guides_have_commands_and_a_script():
    for guide in GUIDES:
        assert blocks(guide, "sh")
        assert blocks(guide, "python")


def test_the_readmes_name_no_file_that_is_not_there():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
