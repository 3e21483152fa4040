"""Plugins by name: real entry points of made-up distributions, and what is said when one does not work."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmdr import registry
from dmdr.errors import ConfigError
from dmdr.registry import GROUPS, Plugin, PluginError, find, load, plugins, suggest

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution: `install("spam", {"objectives": {"egg": "spam_mod:Egg"}}, spam_mod="source")`."""

    def install(name: str, points: dict[str, dict[str, str]], version: str = "1.2", **modules: str) -> None:
        site = tmp_path / name
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, targets in points.items():
            lines += [f"[dmdr.{group}]", *(f"{key} = {target}" for key, target in targets.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        installed.update(modules)
        monkeypatch.syspath_prepend(site)

    installed: set[str] = set()
    yield install
    for module in installed:
        sys.modules.pop(module, None)


def error_of(group: str, name: str) -> str:
    with pytest.raises(PluginError) as error:
        load(group, name)
    assert isinstance(error.value, ConfigError)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_our_own_plugins_come_in_by_entry_points() -> None:
    found = {group: plugins(group) for group in GROUPS}
    assert {"refl"} <= set(found["objectives"])
    assert {"hps", "clip", "dinov2", "toy"} <= set(found["rewards"])
    assert {"dmd"} <= set(found["matchings"])
    assert {"StableDiffusion3Pipeline", "ToyPipeline"} <= set(found["backends"])
    assert {"digits", "toy"} <= set(found["models"])
    version = importlib.metadata.version("dmdr")
    assert found["rewards"]["hps"] == Plugin("rewards", "hps", "dmdr_rewards.hps:HPS", "dmdr", version, ("clip",))
    for group, offered in found.items():
        assert list(offered) == sorted(offered)
        for name, plugin in offered.items():
            assert (plugin.group, plugin.name) == (group, name)
            address = {"http": "http://localhost", "https": "https://localhost"}.get(name, f"{name}:http://localhost")
            named = address if plugin.target.endswith((":RemoteReward", ":SiTModel")) else name
            assert load(group, named).__name__ == plugin.target.partition(":")[2]


def test_a_strangers_plugin_is_found_and_loaded(install: Install) -> None:
    source = (
        "from dataclasses import dataclass\n@dataclass\nclass Egg:\n    size: int = 1\n    needs = __call__ = None\n"
    )
    install("spam", {"objectives": {"egg": "spam_mod:Egg"}}, spam_mod=source)
    assert find("objectives", "egg") == Plugin("objectives", "egg", "spam_mod:Egg", "spam", "1.2")
    assert "refl" in plugins("objectives")
    assert load("objectives", "egg")(size=3).size == 3


def test_unknown_name_suggests_a_known_one() -> None:
    message = error_of("objectives", "rfl")
    assert message.startswith("unknown objective 'rfl' (did you mean 'refl'?); known: ")
    assert "refl" in message.split("known: ")[1]
    assert message.endswith("(a package adds one under the entry-point group 'dmdr.objectives')")
    assert "did you mean" not in error_of("rewards", "zzzzzz")


def test_empty_group_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    assert plugins("rewards") == {}
    assert "unknown reward 'hps'; known: none" in error_of("rewards", "hps")


def test_suggest_needs_likeness() -> None:
    assert suggest("hpsv2", ["hps", "clip"]) == " (did you mean 'hps'?)"
    assert suggest("aesthetic", ["hps", "clip"]) == ""
    assert suggest("hps", []) == ""


def test_missing_package_names_distribution_and_extra(install: Install) -> None:
    install(
        "spam",
        {"rewards": {"egg": "spam_mod:Egg [eggs,bacon]", "ham": "spam_mod:Egg"}},
        spam_mod="import not_there_at_all\n",
    )
    where = "of spam 1.2 (spam_mod:Egg) needs the package 'not_there_at_all': pip install "
    assert error_of("rewards", "egg") == f"reward 'egg' {where}'spam[eggs,bacon]'"
    assert error_of("rewards", "ham") == f"reward 'ham' {where}'not_there_at_all'"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no luck')\n", "cannot be imported: RuntimeError: no luck"),
        ("from dmdr.types import Nothing\n", "cannot be imported: ImportError: cannot import name 'Nothing'"),
        ("def broken(:\n", "cannot be imported: SyntaxError: "),
        ("Other = 1\n", "cannot be imported: AttributeError: module 'spam_mod' has no attribute 'Egg'"),
        ("def Egg(): ...\n", "is no class"),
        ("class Egg: ...\n", "is no dataclass; its fields are its command-line flags"),
    ],
)
def test_broken_plugin_is_named(install: Install, source: str, message: str) -> None:
    install("spam", {"matchings": {"egg": "spam_mod:Egg"}}, spam_mod=source)
    found = error_of("matchings", "egg")
    assert found.startswith("matching 'egg' of spam 1.2 (spam_mod:Egg) ")
    assert message in found


def test_backends_and_models_need_no_dataclass(install: Install) -> None:
    install("spam", {"models": {"egg": "spam_mod:Egg"}}, spam_mod="class Egg: ...\n")
    assert load("models", "egg").__module__ == "spam_mod"


def test_two_distributions_may_not_offer_one_name(install: Install) -> None:
    install("spam", {"rewards": {"egg": "spam_mod:Egg"}})
    install("ham", {"rewards": {"egg": "ham_mod:Egg"}})
    with pytest.raises(PluginError) as error:
        plugins("rewards")
    names = ("ham and spam", "spam and ham")
    assert str(error.value) in [f"reward 'egg' is offered by both {both}; uninstall one of them" for both in names]
    assert "refl" in plugins("objectives")


def test_a_distribution_found_twice_is_no_clash(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("spam", {"rewards": {"egg": "spam_mod:Egg"}})
    again = tmp_path / "again"
    again.symlink_to(tmp_path / "spam")
    monkeypatch.syspath_prepend(again)
    assert find("rewards", "egg").distribution == "spam"


def test_registration_that_cannot_be_read_is_named(install: Install) -> None:
    install("spam", {"rewards": {"egg": "spam mod?"}})
    with pytest.raises(PluginError, match="spam"):
        plugins("rewards")


def test_listing_imports_neither_torch_nor_any_plugin() -> None:
    code = """
import json, sys
import dmdr, dmdr.registry
found = sum((list(dmdr.registry.plugins(group)) for group in dmdr.registry.GROUPS), [])
print(json.dumps([found, sorted(name.partition(".")[0] for name in sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, modules = json.loads(done.stdout)
    assert {"refl", "hps", "dmd", "ToyPipeline", "digits"} <= set(found)
    assert not {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "trl"} & set(modules)
    assert not [name for name in modules if name.startswith("dmdr_")]


def test_groups_read_as_nouns() -> None:
    assert [group[:-1] for group in registry.GROUPS] == ["objective", "reward", "matching", "backend", "model"]
