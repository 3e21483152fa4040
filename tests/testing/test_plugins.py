"""Every installed plugin keeps the contract; a new one is tested by being registered."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from benchmark_parts import build_judge
from dmdr.protocols import NamedModel, with_options
from dmdr.settings import kinds, registry
from dmdr.testing import (
    check_backend,
    check_benchmark,
    check_matching,
    check_objective,
    check_reward,
    check_sample_weight,
)
from dmdr_digits import Digits

COLUMNS = {
    "label": [7, 0, 3, 9],
    "text": ["seven", "zero", "three", "nine"],
    "vqa_list": [[["Is it a seven?", "Yes"]]] * 4,
}
ELSEWHERE = ("http", "https", "remote", "vlm", "dina")  # of a server, or a pipeline: tests/remote, tests/plugins
# Models whose name is all that they need; the others are followed by a file (`classmethod at`).
MODELS = [name for name in registry.plugins("models") if not name.startswith("sit-")]

# Benchmarks that need networks which are not here; tests/plugins has small ones.
WITHOUT_NETWORKS = ("distribution", "geneval")
ASKED: dict[str, list[dict[str, Any]]] = {  # rows of benchmarks that cannot do with any
    "ocr": [{"prompt": 'a sign that says "one"'}, {"prompt": 'a shop called "two"'}],  # an image takes 0.2 s
    "geneval2": [
        {"prompt": "a mug", "atom_count": 1, "vqa_list": [["Is there a mug?", "Yes"]], "skills": ["object"]},
        {
            "prompt": "two owls",
            "atom_count": 2,
            "vqa_list": [["How many owls are there?", "two"], ["Are there owls?", "Yes"]],
            "skills": ["count", "object"],
        },
    ],
    "dpg": [
        {
            "prompt": f"a blue {thing}",
            "item_id": thing,
            "questions": [f"Is there a {thing}?", "Is it blue?"],
            "parents": [[], [0]],
            "categories": ["entity", "attribute"],
        }
        for thing in ("mug", "owl")
    ],
}


@pytest.mark.parametrize("name", registry.plugins("objectives"))
def test_objective(name: str) -> None:
    check_objective(registry.load("objectives", name))


@pytest.mark.parametrize("name", registry.plugins("matchings"))
def test_matching(name: str) -> None:
    check_matching(registry.load("matchings", name))


@pytest.mark.parametrize("name", registry.plugins("sample_weights"))
def test_sample_weight(name: str) -> None:
    check_sample_weight(registry.load("sample_weights", name))


@pytest.mark.parametrize("name", [name for name in registry.plugins("rewards") if name not in ELSEWHERE])
def test_reward(name: str, digits: Digits, tmp_path: Path) -> None:
    cls = registry.load("rewards", name)
    path = digits.reward_checkpoint(name)
    options = {"checkpoint": str(path)} if path else with_judge("rewards", cls, tmp_path)
    check_reward(cls(**options), columns=COLUMNS)


@pytest.mark.parametrize("name", [name for name in registry.plugins("benchmarks") if name not in WITHOUT_NETWORKS])
def test_benchmark(name: str, digits: Digits, tmp_path: Path) -> None:
    cls = registry.load("benchmarks", name)
    check_benchmark(cls(**with_judge("benchmarks", cls, tmp_path)), ASKED.get(name), model=digits)


def with_judge(group: str, cls: type, folder: Path) -> dict[str, str]:
    """The option of a plugin that asks a vision-language model: a small one, in this folder."""
    if "judge" not in [field.name for field in kinds.flag_fields(group, cls)]:
        return {}
    build_judge(folder)
    return {"judge": str(folder)}


@pytest.mark.parametrize("name", MODELS)
def test_model_and_its_backend(name: str, digits: Digits) -> None:
    model = registry.load("models", name)()
    assert isinstance(model, NamedModel)
    folder = model.folder()
    pipeline = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
    assert pipeline == model.pipeline
    cls = registry.load("backends", pipeline)
    small = {"lora_rank": 4, "lora_alpha": 8.0, "fake_lora_rank": 4, "fake_lora_alpha": 4.0}
    backend = cls(str(folder), with_options(cls.Options(), **small))
    check_backend(backend, [row["prompt"] for row in model.prompts()[:3]])


@pytest.mark.parametrize("name", MODELS)
def test_recipe_names_settings(name: str) -> None:
    from dmdr.settings.chosen import flags_of_all
    from dmdr.settings.parse import parse

    settings = parse(settings={"model": name})
    recipe = registry.load("models", name).recipe
    values = settings.values()
    short = {key: value for plugin in settings.plugins for key, value in plugin.options.items()}
    others = {each.name for own in flags_of_all("matchings").values() for each in own}  # than the run's, which has dmd
    for key, value in recipe.items():
        if key != "objectives" and key not in others - short.keys():
            assert (values | short)[key] == value


def test_core_names_no_plugin() -> None:
    import dmdr

    names = [n for group in ("objectives", "rewards") for n in registry.plugins(group) if n != "toy"]
    for file in Path(inspect.getfile(dmdr)).parent.rglob("*.py"):
        text = file.read_text()
        assert not any(f'"{name}"' in text or f"dmdr_{name}" in text for name in names), file
