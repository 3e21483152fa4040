"""The template of a plugin package in a fresh environment, what `dmdr-plugins new` writes, and the plugins' guide."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmdr.cli.plugins import run, template, write_package
from dmdr.errors import ConfigError

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "examples" / "plugin_template"
Shell = Callable[..., str]
pytestmark = pytest.mark.timeout(580)  # a test here starts up to ten programs, each of which imports torch


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment that holds nothing of its own, and sees the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # addsitedir, and not the bare path: the .pth file of an editable install is read, too.
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for command in ("dmdr-train", "dmdr-eval", "dmdr-plugins"):
        module = f"dmdr.cli.{command.removeprefix('dmdr-')}"
        script = folder / "bin" / command
        script.write_text(f"#!{folder}/bin/python\nfrom {module} import main\nmain()\n")
        script.chmod(0o755)
    return folder


@pytest.fixture
def shell(environment: Path, tmp_path: Path) -> Shell:
    """Run a command line in the fresh environment; its output, once it has succeeded."""
    around = {"PATH": f"{environment}/bin{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    around |= {"HF_HUB_OFFLINE": "1", "DMDR_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}

    def run(line: str) -> str:
        command = shlex.split(line)
        if command[0] in ("pytest", "pip"):
            command = [str(environment / "bin" / "python"), "-m", *command]
        if command[:4] == [str(environment / "bin" / "python"), "-m", "pip", "install"]:
            command += ["--quiet", "--no-build-isolation"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | around)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


TRAIN = "dmdr-train --model toy --stage1_steps 2 --stage2_steps 2 --per_device_train_batch_size 8"


@pytest.mark.verify
def test_a_strangers_package_in_a_fresh_environment(shell: Shell, tmp_path: Path) -> None:
    shell(f"pip install {TEMPLATE}")
    listed = shell("dmdr-plugins check")
    for kind, name, cls in (("objective", "target_score", "TargetScore"), ("reward", "brightness", "Brightness")):
        row = next(line.split() for line in listed.splitlines() if line.split()[1] == name)
        assert row == [kind, name, "dmdr-template", "0.1.0", f"dmdr_template:{cls}"]
    usage = shell("dmdr-train --rl target_score --help")
    assert re.search(r"--target \S+\s+The score that images shall have", usage)
    shell(f"{TRAIN} --rl target_score --reward brightness --target 0.3 --output_dir run")
    assert "target_score/distance" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "target_score_target: 0.3" in (tmp_path / "run" / "config.yaml").read_text()
    assert "3 passed" in shell(f"pytest -p no:cacheprovider {TEMPLATE}")
    assert "24 passed" in shell("pytest -p no:cacheprovider --dmdr-plugin target_score --dmdr-plugin brightness")
    for kind in ("matching", "reward", "benchmark"):
        shell(f"dmdr-plugins new my_{kind} --kind {kind}")
        shell(f"pip install ./my-{kind}")
        assert "2 passed" in shell(f"pytest -p no:cacheprovider my-{kind}")
    shell(f"{TRAIN} --matching my_matching --length 0.5 --rl refl --reward my_reward --power 2 --output_dir both")
    (tmp_path / "prompts.txt").write_text("mode 1\n")
    assert "share of dark" in shell("dmdr-eval both --benchmark my_benchmark --dark 0.3 --prompts prompts.txt")


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("objective", ['my_aim = "dmdr_my_aim:MyAim"', 'my_aim_reward = "dmdr_my_aim:MyAimReward"']),
        ("matching", ['[project.entry-points."dmdr.matchings"]\nmy_aim = "dmdr_my_aim:MyAim"']),
        ("reward", ['[project.entry-points."dmdr.rewards"]\nmy_aim = "dmdr_my_aim:MyAim"']),
        ("benchmark", ['[project.entry-points."dmdr.benchmarks"]\nmy_aim = "dmdr_my_aim:MyAim"']),
    ],
)
def test_new_writes_a_package_of_that_name(kind: str, points: list[str], tmp_path: Path) -> None:
    package = tmp_path / "here"
    run(["new", "my_aim", "--kind", kind, "--output_dir", str(package)])
    assert {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()} == {
        "README.md",
        "pyproject.toml",
        "dmdr_my_aim/__init__.py",
        "tests/test_dmdr_my_aim.py",
    }
    text = "".join(path.read_text() for path in package.rglob("*.*") if path.is_file())
    assert not re.search("template|target_score|TargetScore|brightness|Brightness|unit_dmd|UnitDMD", text)
    assert all(point in text for point in points) and text.count(' = "dmdr_my_aim:') == len(points)
    test = (package / "tests" / "test_dmdr_my_aim.py").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package)
        names: dict[str, Any] = {}
        exec(test, names)
        [*names.values()][-1]()  # of what it is for; all of DMDR's checks take longer
    del sys.modules["dmdr_my_aim"]


@pytest.mark.parametrize("name", ["My", "2fast", "with-dash", "ends_", ""])
def test_new_wants_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="a name has lower-case letters"):
        write_package(name, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["none", "true", "class", "needs", "term", "sequence", "class_var"])
def test_new_wants_a_name_that_code_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=f"new {name}: (the package's code already uses '.*'|'.*' is a word of Python); choose"
    ):
        write_package(name, None)
    assert not list(tmp_path.iterdir())


def test_new_guesses_no_abbreviation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="unrecognized arguments: --out elsewhere"):
        run(["new", "mine", "--out", "elsewhere"])
    assert not list(tmp_path.iterdir())


def test_new_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"new refl: objective 'refl' of dmdr .* has this name"):
        write_package("refl", None)
    with pytest.raises(ConfigError, match="new flux: there is a package dmdr_flux already"):
        write_package("flux", None)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="new mine: mine exists; choose another with --output_dir"):
        write_package("mine", None)


def test_the_template_is_the_example() -> None:
    assert template().resolve() == TEMPLATE.resolve()


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block."""
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


GUIDE = (ROOT / "plugins" / "README.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"^## (.*)$", GUIDE, flags=re.MULTILINE)[1:])] * 2, strict=True))
BEST, REINFORCE, UNIT, INK = "best.py:Best", "reinforce.py:Reinforce", "unit.py:Unit", "ink.py:Ink"
BETTER, SURROGATE, RED = "better.py:Better", "surrogate.py:Surrogate", "red.py:Red"
RUN = {  # title of a section: programs of its commands in order; commands and files, and what they say
    "Your first objective in ten minutes": (
        ["dmdr-train", "pytest", "dmdr-plugins", "pip", "pytest", "dmdr-plugins"],
        {
            f"pytest --dmdr-plugin {BEST}": ["15 passed"],
            "runs/best/metrics.jsonl": [f'"loss/{BEST}"', f'"{BEST}/best"'],
            f"dmdr-train --rl {BEST} --help": ["How hard the student is pulled."],
            "pytest best-of-n": ["3 passed"],  # of the package that was written and installed
            "dmdr-plugins": [r"objective +best_of_n +dmdr-best-of-n 0.1.0 +dmdr_best_of_n:BestOfN\n"],
        },
    ),
    "A policy gradient": (
        ["dmdr-train", "pytest"],
        {f"pytest --dmdr-plugin {REINFORCE}": ["15 passed"], "runs/reinforce/metrics.jsonl": [f'"{REINFORCE}/kl"']},
    ),
    "A matching": (
        ["dmdr-train", "pytest"],
        {f"pytest --dmdr-plugin {UNIT}": ["13 passed"], "runs/unit/config.yaml": ["unit_py_Unit_length: 0.5"]},
    ),
    "A reward": (["pytest"], {f"pytest --dmdr-plugin {INK}": ["9 passed"]}),
    "A sample weight": (
        ["dmdr-train", "pytest"],
        {"runs/better/config.yaml": ["better_py_Better_edge: 3.0"], f"pytest --dmdr-plugin {BETTER}": ["9 passed"]},
    ),
    "Your first benchmark": (
        ["dmdr-train", "dmdr-eval", "pytest"],
        {
            f"pytest --dmdr-plugin {RED}": ["15 passed"],
            "runs/toy/evaluation/red.py:Red.md": [
                "is above 0.6",
                r"\| model \| red \| share \| images \|",
                "to teacher",
            ],
        },
    ),
    "Parameters of your own": (
        ["dmdr-train", "pytest"],
        {f"pytest --dmdr-plugin {SURROGATE}": ["15 passed"], "runs/surrogate/metrics.jsonl": ['"grad_norm/surrogate"']},
    ),
    "A model family": ([], {"my_options.py": []}),
}


def test_every_block_of_the_guide_is_tried() -> None:
    assert [title for title, text in SECTIONS.items() if {"sh", "python"} & {kind for kind, _ in blocks(text)}] == [
        *RUN
    ]


@pytest.mark.parametrize("title", RUN)
def test_the_guide_is_true(title: str, shell: Shell, tmp_path: Path) -> None:
    """A section's files are written and its commands run, in order."""
    programs, promises = RUN[title]
    outputs: dict[str, str] = {}
    lines, files = [], []
    for language, content in blocks(SECTIONS[title]):
        if language == "python":
            files.append(content.splitlines()[0].removeprefix("# "))
            assert files[-1].endswith(".py")
            (tmp_path / files[-1]).write_text(content)
        elif language == "sh":
            lines += content.replace("\\\n", " ").splitlines()
    for name in files:
        if not any(f" {name}:" in line for line in lines):  # which would run it, too
            shell(f"python {name}")
    assert [line.split()[0] for line in lines] == programs
    for line in lines:
        outputs[line] = shell(line)
    for where, texts in promises.items():
        file = tmp_path / where
        said = outputs.get(where) or (file.read_text() if file.is_file() else shell(where))
        assert all(text in said or re.search(text, said) for text in texts), said
