"""The model card of an export, whatever names it is made of."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmdr.backends.toy import ToyBackend
from dmdr.run.export import code_span, export
from dmdr.sampling import FewStepSampler
from toy_trainer import prepared

HOSTILE = [
    "rw<b>x.py:score",
    "a`b``c",
    "`",
    "*_[x](http://y)_*",
    "--- # x: [1",
    "line\nbreak\n---\n# heading",
    "\x1b[31mred",
    "{{ 7 * 7 }}",
    "'\"",
    "'''\"\"\"",
    "key: value",
    "- item",
    "no",
    "\ud83d",
    "\u202eright",
    "x" * 500,
]


def card(tmp_path: Path, name: str, backend: ToyBackend | None = None) -> str:
    backend = backend or prepared()
    sampler = FewStepSampler(backend.path, backend.grid(2), 1.0)
    about: dict[str, Any] = {"base": name, "family": None, "name": name, "prompt": name, "mixed_precision": "no"}
    folder = export(tmp_path / "student", backend, sampler, objectives=name, rewards=name, **about)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_is_sound_whatever_the_names(tmp_path: Path, name: str) -> None:
    text = card(tmp_path, name)
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert "base_model" not in yaml.safe_load(front)
    assert yaml.safe_load(front)["tags"] == ["distillation", "dmd", "full-finetune"]
    assert body.count("\n# A 2-step") == 1 and "\n# heading" not in body and "\x1b" not in body and "49" not in body
    shown = code_span(name).encode("utf-8", "backslashreplace").decode()
    rest = body.replace(shown, "")  # each name is a code span, and nothing else is left of it
    assert body.count(shown) >= 4 and "<b>" not in rest and "http:" not in rest


def test_a_card_names_a_teacher_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is none, even where its path looks like an id."""
    monkeypatch.chdir(tmp_path)
    assert "\nbase_model: org/model\nlibrary_name: diffusers\n" in card(tmp_path, "org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert "base_model" not in card(tmp_path, "org/model").partition("\n---\n")[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_code_span_ends_where_it_should(name: str) -> None:
    """By CommonMark: the first run of as many backticks."""
    span = code_span(name)
    fence = re.match("`+", span)
    assert fence and "\n" not in span
    inner = span[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inner)
    assert not inner.startswith("`") and not inner.endswith("`")


def test_a_snippet_is_fenced_by_more_backticks_than_it_holds(tmp_path: Path) -> None:
    class Ticked(ToyBackend):
        def snippet(self, base: str, prompt: str, sampler: Any) -> str:
            return f"# {base}"

    assert "`````python\n# a````\n`````\n" in card(tmp_path, "a````", prepared(Ticked))
