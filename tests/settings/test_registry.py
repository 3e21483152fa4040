"""Plugins by name: real entry points of made-up distributions, and what is said when one does not work."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmdr.errors import ConfigError
from dmdr.settings.kinds import GROUPS, NOUNS, PluginError
from dmdr.settings.registry import Plugin, find, load, plugins, problem, registered, suggest

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
    source = dataclass_of("size: int = 1", "needs = 1", "def __call__(self, draw, ctx): ...")
    install("spam", {"objectives": {"egg": "spam_mod:Egg"}}, spam_mod=source)
    assert find("objectives", "egg") == Plugin("objectives", "egg", "spam_mod:Egg", "spam", "1.2")
    assert "refl" in plugins("objectives")
    assert load("objectives", "egg")(size=3).size == 3


def test_unknown_name_suggests_a_known_one() -> None:
    message = error_of("objectives", "rfl")
    assert message.startswith("unknown objective 'rfl' (did you mean 'refl'?); known: ")
    assert "refl" in message.split("known: ")[1]
    assert message.endswith(
        "(a package adds one under the entry-point group 'dmdr.objectives', or write FILE.py:CLASS)"
    )
    assert "did you mean" not in error_of("rewards", "zzzzzz")


def test_empty_group_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert plugins("rewards") == {}
    assert "unknown reward 'hps'; known: none" in error_of("rewards", "hps")


def test_what_is_installed_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook."""
    monkeypatch.syspath_prepend(tmp_path)
    assert "late" not in plugins("objectives")
    folder = tmp_path / "late-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[dmdr.objectives]\nlate = late:Late\n")
    assert find("objectives", "late").full_name == "late:late"


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
    where = "of spam 1.2 (spam_mod:Egg) needs the module 'not_there_at_all', which is not installed"
    assert error_of("rewards", "egg") == f"reward 'egg' {where}: pip install 'spam[eggs,bacon]'"
    assert error_of("rewards", "ham") == f"reward 'ham' {where}"


def dataclass_of(*lines: str) -> str:
    """Source of a dataclass Egg."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"from dataclasses import dataclass\n@dataclass\nclass Egg:\n{body}"


REST = "renoise = fake_loss = direction = lambda self, *arguments: None"
UNFIT = "; see dmdr.protocols"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no luck')\n", "cannot be imported: RuntimeError: no luck"),
        ("import sys\nsys.exit('bye')\n", "cannot be imported: SystemExit: bye"),
        ("from dmdr.types import Nothing\n", "cannot be imported: ImportError: cannot import name 'Nothing'"),
        ("def broken(:\n", "cannot be imported: SyntaxError: "),
        ("Other = 1\n", "has no 'Egg' in spam_mod"),
        ("def Egg(): ...\n", "is no class"),
        ("class Egg: ...\n", "is no dataclass; make it one: its fields are the command-line flags"),
        (dataclass_of("x: 'Nowhere' = 1"), "has a field whose type cannot be read: name 'Nowhere' is not defined"),
        (dataclass_of("x: dict = None"), "has a field 'x' of a type that no flag can have: <class 'dict'>"),
        (dataclass_of("x: int | str = 1"), "has a field 'x' of a type that no flag can have: int | str"),
        (
            dataclass_of("x: 'list[tuple] | None' = None"),
            "has a field 'x' of a type that no flag can have: list[tuple]",
        ),
        (dataclass_of("x: int = 1"), "has no anchor and no renoise and no fake_loss and no direction" + UNFIT),
        (dataclass_of("anchor = None", REST), "has a anchor that cannot be called" + UNFIT),
        (
            dataclass_of("def anchor(self, draw): ...", REST),
            "cannot be called as anchor(prediction, draw, ctx): too many",
        ),
        (
            dataclass_of("def anchor(self, a, b, c, d): ...", REST),
            "cannot be called as anchor(prediction, draw, ctx): missing",
        ),
    ],
)
def test_broken_plugin_is_named(install: Install, source: str, message: str) -> None:
    install("spam", {"matchings": {"egg": "spam_mod:Egg"}}, spam_mod=source)
    found = error_of("matchings", "egg")
    assert found.startswith("matching 'egg' of spam 1.2 (spam_mod:Egg) ")
    assert message in found
    assert problem(find("matchings", "egg")) == found.removeprefix("matching 'egg' of spam 1.2 (spam_mod:Egg) ")
    assert problem(find("matchings", "dmd")) is None


def test_a_reward_must_take_all_columns(install: Install) -> None:
    lines = (
        "differentiable = True",
        "def prepare(self, device, dtype): ...",
        "def __call__(self, images, prompts): ...",
    )
    install("spam", {"rewards": {"egg": "spam_mod:Egg"}}, spam_mod=dataclass_of(*lines))
    assert "cannot be called as __call__(images, prompts, **columns): it takes no **columns" in error_of(
        "rewards", "egg"
    )


def test_a_reward_may_ask_for_its_columns_by_name(install: Install) -> None:
    lines = (
        "differentiable: ClassVar[bool] = True",
        "columns: ClassVar = ('caption',)",
        "prepare = lambda self, a, b: 1",
    )
    call = "def __call__(self, images, prompts, caption, **columns): ..."
    source = "from typing import ClassVar\n" + dataclass_of(*lines, call)
    install("spam", {"rewards": {"egg": "spam_mod:Egg"}}, spam_mod=source)
    assert load("rewards", "egg").columns == ("caption",)
    flag = source.replace("differentiable: ClassVar[bool]", "differentiable: bool")
    install("ham", {"rewards": {"ham": "ham_mod:Egg"}}, ham_mod=flag)
    assert "has a field 'differentiable', which cannot be a flag: annotate it" in error_of("rewards", "ham")


def test_optional_methods_are_called_with_the_context(install: Install) -> None:
    lines = ("needs = 1", "def __call__(self, draw, ctx): ...", "def setup(self): ...")
    install("spam", {"objectives": {"egg": "spam_mod:Egg"}}, spam_mod=dataclass_of(*lines))
    assert "cannot be called as setup(ctx): too many positional arguments" in error_of("objectives", "egg")


def test_a_name_of_another_kind_says_so() -> None:
    assert "unknown objective 'hps' (there is a reward of this name: --reward hps)" in error_of("objectives", "hps")
    assert error_of("objectives", "best.py") == "--rl best.py: add the name of the objective, as in my_file.py:NAME"
    assert error_of("objectives", "dmdr:refll").startswith(
        "dmdr has no objective of that name; it has dmdr:ca_advantage"
    )


def test_what_looks_like_another_kind_says_so(tmp_path: Path) -> None:
    (tmp_path / "mm.py").write_text("from dmdr.matching import DMD as Mine\ndef score(images): ...\n")
    hint = "it looks like one of the matchings: name it with --matching"
    assert f"has no needs and no __call__; {hint};" in error_of("objectives", f"{tmp_path}/mm.py:Mine")
    assert "is no class; it looks like one of the rewards: name it with --reward" in error_of(
        "objectives", f"{tmp_path}/mm.py:score"
    )


def test_a_group_that_nothing_reads_is_named(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    from dmdr.cli.plugins import check_plugins

    install("spam", {"matching": {"egg": "spam_mod:Egg"}})
    stray = "spam 1.2 offers 'egg' in the unknown entry-point group 'dmdr.matching' (did you mean 'dmdr.matchings'?)"
    assert error_of("matchings", "egg").startswith(f"unknown matching 'egg'; {stray}; known: ")
    assert stray not in error_of("matchings", "ham")
    check_plugins()
    assert capsys.readouterr().out.endswith(f"\nwarning: {stray}\n")


def test_the_list_imports_nothing(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    from dmdr.cli.plugins import check_plugins, list_plugins

    install("spam", {"rewards": {"egg": "spam_mod:Egg"}}, spam_mod="raise ValueError('imported')")
    list_plugins()
    assert "broken" not in capsys.readouterr().out
    check_plugins(["egg"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("reward") and "  broken: " in line and line.endswith("ValueError: imported")
    with pytest.raises(ConfigError, match=r"check eg: no plugin has this name \(did you mean 'egg'\?\)"):
        check_plugins(["eg"])


def test_a_method_that_looks_misspelt_is_warned_of(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By the list of plugins, and at the start of a run, also where the plugin is in a file."""
    from dmdr.cli.plugins import check_plugins
    from dmdr.settings.parse import parse

    needs = "from dmdr.protocols import Needs\n"
    lines = ("needs = Needs(reward=False)", "def __call__(self, draw, ctx): ...", "def share_noise(self, ctx): ...")
    install("spam", {"objectives": {"egg": "spam_mod:Egg"}}, spam_mod=needs + dataclass_of(*lines))
    doubt = "objective 'egg' has a method share_noise: do you mean shared_noise of dmdr.protocols.SharesNoise?"
    check_plugins()
    assert f"  warning: {doubt}\n" in capsys.readouterr().out
    parse(["--model=toy", f"--rl={tmp_path}/spam/spam_mod.py:Egg as egg"])
    assert [record.getMessage() for record in caplog.records] == [
        doubt.replace("'egg'", f"'{tmp_path}/spam/spam_mod.py:Egg as egg'")
    ]
    parse(["--model=toy", "--rl=refl+grpo+dpo+nft", "--reward=toy", "--matching=decoupled"])
    assert len(caplog.records) == 1


def test_what_nobody_typed_is_of_its_own_distribution(install: Install) -> None:
    """A stranger's package that offers a default's name stops only runs that name it."""
    from dmdr.run.job import assemble
    from dmdr.settings.parse import parse

    points = {
        "matchings": {"dmd": "spam_mod:Egg"},
        "rewards": {"toy": "spam_mod:Egg"},
        "models": {"digits": "spam_mod:Egg"},
        "backends": {"ToyPipeline": "spam_mod:Egg", "StableDiffusion3Pipeline": "spam_mod:Egg"},
        "sample_weights": {"rt_dm": "spam_mod:Egg"},
    }
    install("spam", points, spam_mod="raise RuntimeError\n")
    assert parse(settings={}).config.model == "dmdr:digits"
    with pytest.raises(ConfigError, match="write --model dmdr:digits or --model spam:digits"):
        parse(settings={"model": "digits"})
    settings = parse(settings={"model": "toy"})
    assert type(assemble(settings).backend).__module__ == "dmdr.backends.toy"
    assert [plugin.cls.__module__ for plugin in settings.plugins] == [
        "dmdr.backends.toy", "dmdr.matching", "dmdr.training.tilt", "dmdr.backends.toy"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="write --matching dmdr:dmd or --matching spam:dmd"):
        parse(settings={"model": "toy", "matching": "dmd"})


def test_a_function_may_be_registered_as_a_reward(install: Install) -> None:
    source = "def score(images, prompts): return [1.0] * len(images)\n"
    install("spam", {"rewards": {"egg": "spam_mod:score"}}, spam_mod=source)
    assert load("rewards", "egg")().reads_prompts


def test_flags_of_every_kind_are_welcome(install: Install) -> None:
    fields = ("a: int = 1", "b: 'float | None' = None", "c: Optional[list[str]] = None", "d: Literal['x', 1] = 'x'")
    source = "from typing import Literal, Optional\n" + dataclass_of(
        *fields, "needs = 1", "def __call__(self, draw, ctx): ..."
    )
    install("spam", {"objectives": {"egg": "spam_mod:Egg"}}, spam_mod=source)
    assert load("objectives", "egg")(c=["z"]).c == ["z"]


def test_its_own_module_is_not_for_pip(install: Install) -> None:
    install("spam", {"rewards": {"egg": "spam_gone.deep:Egg"}})
    assert error_of("rewards", "egg").endswith("(spam_gone.deep:Egg) has no module 'spam_gone': reinstall spam")


def test_backends_and_models_need_no_dataclass(install: Install) -> None:
    model = "class Egg:\n recipe = {}\n pipeline = 'EggPipeline'\n folder = prompts = judge = lambda self: None\n"
    install(
        "spam",
        {"models": {"egg": "spam_mod:Egg"}},
        spam_mod=model + " reward_checkpoint = lambda self, reward, **_: 1\n",
    )
    assert load("models", "egg").__module__ == "spam_mod"
    install("ham", {"models": {"ham": "ham_mod:Egg"}}, ham_mod=model)
    assert error_of("models", "ham") == "model 'ham' of ham 1.2 (ham_mod:Egg) has no reward_checkpoint" + UNFIT


EGG = dataclass_of("needs = 1", "def __call__(self, draw, ctx): ...")


def test_of_two_distributions_that_offer_one_name_one_is_chosen(install: Install) -> None:
    install("spam", {"objectives": {"egg": "spam_mod:Egg"}}, spam_mod=EGG)
    install("my_ham", {"objectives": {"egg": "ham_mod:Egg"}}, ham_mod=EGG)
    wanted = "objective 'egg' is offered by my_ham 1.2 and by spam 1.2; write --rl my_ham:egg or --rl spam:egg"
    assert error_of("objectives", "egg") == wanted
    assert load("objectives", "spam:egg").__module__ == "spam_mod"
    assert load("objectives", "my-ham:egg").__module__ == "ham_mod"  # PEP 503: the same name
    assert load("objectives", "dmdr:refl") is load("objectives", "refl")
    assert {"my_ham:egg", "spam:egg", "refl"} <= set(plugins("objectives"))
    assert "egg" not in plugins("objectives")
    assert registered("objectives", "egg") == "egg"  # so that it is not taken for something else, a folder say
    assert registered("objectives", "spam:egg") == "spam:egg"


def test_a_pipeline_with_two_backends_says_which_flag_chooses(install: Install) -> None:
    install("spam", {"backends": {"EggPipeline": "spam_mod:Egg"}})
    install("ham", {"backends": {"EggPipeline": "ham_mod:Egg"}})
    assert error_of("backends", "EggPipeline").endswith("write --backend ham:EggPipeline or --backend spam:EggPipeline")


def test_an_address_may_have_its_distribution_before_it(install: Install) -> None:
    source = "class Egg:\n @classmethod\n def at(cls, address):\n  return type('At', (), {'address': address})\n"
    source += (
        " recipe = {}\n pipeline = 'EggPipeline'\n folder = prompts = judge = lambda self: None\n"
        " reward_checkpoint = lambda self, r, **_: 1\n"
    )
    install("spam", {"models": {"egg": "spam_mod:Egg"}}, spam_mod=source)
    for name in ("egg:some/file.pt", "spam:egg:some/file.pt"):
        assert load("models", name).address == "egg:some/file.pt"
    assert registered("models", "spam:egg:some/file.pt") == "spam:egg"


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
    assert (
        error_of("rewards", "egg")
        == "reward 'egg' of spam 1.2 (spam mod?) has an entry point that must be 'module:Class', but is not"
    )
    assert "hps" in plugins("rewards")


def test_listing_imports_neither_torch_nor_any_plugin() -> None:
    code = """
import json, sys
import dmdr, dmdr.settings.registry
found = sum((list(dmdr.settings.registry.plugins(group)) for group in dmdr.settings.kinds.GROUPS), [])
print(json.dumps([found, sorted(name.partition(".")[0] for name in sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, modules = json.loads(done.stdout)
    assert {"refl", "hps", "dmd", "ToyPipeline", "digits"} <= set(found)
    assert not {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "trl"} & set(modules)
    assert not [name for name in modules if name.startswith("dmdr_")]


REWARD = ("prepare = lambda self, device, dtype: None", "__call__ = lambda self, images, prompts, **columns: images")


@pytest.mark.parametrize(
    ("group", "source", "message"),
    [
        (
            "rewards",
            dataclass_of("differentiable = True", "columns = 5", *REWARD),
            "has columns 5, which is no tuple of names",
        ),
        (
            "rewards",
            dataclass_of("differentiable = True", "columns = ('caption')", *REWARD),
            "columns 'caption', which is no tuple of names: write it as ('caption',)",
        ),
        (
            "rewards",
            dataclass_of("@property", "def differentiable(self): return False", *REWARD),
            "must have differentiable = True or False",
        ),
        ("rewards", dataclass_of("differentiable = True", REWARD[0]), "has no __call__"),
        ("objectives", dataclass_of("needs = 1", "def loss(self, draw, ctx): ..."), "has no __call__"),
        (
            "models",
            "class Egg:\n recipe = property(lambda self: {})\n folder = prompts = judge = lambda self: 1\n"
            " pipeline = 'EggPipeline'\n reward_checkpoint = lambda self, reward, **_: 1\n",
            "must have a recipe, a mapping",
        ),
        (
            "models",
            "class Egg:\n recipe = {}\n folder = prompts = judge = lambda self: 1\n"
            " pipeline = property(lambda self: 'EggPipeline')\n reward_checkpoint = lambda self, reward, **_: 1\n",
            "must have a pipeline, a class name",
        ),
        ("models", "def __getattr__(name): raise RuntimeError('boo')\n", "cannot be inspected: RuntimeError: boo"),
    ],
)
def test_what_is_read_off_a_class_is_checked(install: Install, group: str, source: str, message: str) -> None:
    install("spam", {group: {"egg": "spam_mod:Egg"}}, spam_mod=source)
    assert message in error_of(group, "egg")
    assert message in str(problem(find(group, "egg")))


def test_what_an_uninstall_left_behind_stops_nobody(install: Install, tmp_path: Path) -> None:
    install("spam", {"rewards": {"hps": "spam_mod:Egg", "egg": "spam_mod:Egg"}})
    (tmp_path / "spam" / "spam-1.2.dist-info" / "METADATA").unlink()
    assert {"dmdr:hps", "?:hps", "egg"} <= set(plugins("rewards"))
    assert error_of("rewards", "egg").startswith("reward 'egg' of ? ? (spam_mod:Egg) ")


def test_a_distribution_must_not_offer_a_name_twice(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    from dmdr.cli.plugins import check_plugins

    install("spam", {"rewards": {"egg": "spam_mod:Egg", "egg ": "spam_mod:Ham"}})
    twice = "reward 'spam:egg' is offered twice by this package, as spam_mod:Egg and as spam_mod:Ham"
    assert error_of("rewards", "egg") == error_of("rewards", "spam:egg") == twice
    check_plugins()
    assert capsys.readouterr().out.count(f"broken: {twice}") == 2


def test_a_mistyped_distribution_is_suggested(install: Install) -> None:
    with pytest.raises(ConfigError, match=r"\(did you mean 'dmdr:hps'\?\)"):
        load("rewards", "dmdrr:hps")


def test_groups_read_as_nouns() -> None:
    names = ["objective", "reward", "matching", "sample_weight", "backend", "model", "benchmark"]
    assert [group[:-1] for group in GROUPS] == names
    nouns = ["objective", "reward", "matching", "sample weight", "model family", "model", "benchmark"]
    assert [NOUNS[group] for group in GROUPS] == nouns
