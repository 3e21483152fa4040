"""The README and the guides: each command is run in short, or at least its flags are read; links lead somewhere."""

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dmdr
from dmdr.cli import eval as eval_command
from dmdr.cli import plugins as plugins_command
from dmdr.cli import reward_server, sample
from dmdr.cli import train as train_command
from dmdr.settings import models
from dmdr.settings.parse import parse, parse_command
from dmdr_digits import Digits

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *("README.md", "examples/README.md", "examples/digits/README.md", "examples/ablation_matrix/README.md"),
    *(str(file.relative_to(ROOT)) for file in sorted((ROOT / "examples" / "guides").glob("*.md"))),
]
TEMPLATES = [f"examples/{kind}_template/README.md" for kind in ("plugin", "matching", "reward", "benchmark")]
COVERED = ["plugins/README.md", *TEMPLATES]  # test_plugin_template.py runs their commands
LINKED = [*DOCUMENTS, *COVERED, "CONTRIBUTING.md", "CHANGELOG.md"]
LINKED += [f"examples/reward_servers/{name}/README.md" for name in ("hpsv3", "image_reward", "unified_reward")]
LINKED += ["examples/benchmarks/README.md", "examples/benchmarks/NOTES.md"]
LANGUAGES = {"sh", "python", "yaml", "toml", "bibtex"}
PROGRAMS = ("dmdr-", "pytest", "python", "make", "pip", "git", "accelerate", "torchrun", "hf", "WORLD_SIZE=")

# Each command belongs to the first pattern that it matches, and each pattern has a command.
EXCEPTED = {
    r"git clone .*": "the place of the repository is not known",
    r"pip install .*": "it changes the environment; `make verify` installs into a fresh one",
    r"make (demo|bench)": "minutes to hours; `make verify` does what they do",
    r"hf auth login": "it asks for a password",
    r"dmdr-train init .*": "networks of full size; tests/cli/test_init.py runs it",
    r"python examples/digits/(table|objectives)\.py": "an hour; `make verify` runs them",
    r"python examples/digits/methods\.py": "hours; test_methods.py reads its settings",
}
PARSED = {
    r"accelerate launch .*": "a model of the hub, on several GPUs",
    r"torchrun .*": "test_objectives.py runs it with two processes",
    r"dmdr-reward-server .*": "it waits for requests; test_remote.py runs it",
    r"dmdr-train .*http://.*": "it needs a server",
    r"dmdr-train --report_to .*": "tests/run/test_log.py runs it",
    r"dmdr-train --push_to_hub .*": "tests/run/test_upload.py runs it",
    r"(WORLD_SIZE=\d+ )?dmdr-train .*--dry_run( --gpu_memory \d+)?": "networks of full size; tests/dry_run runs it",
    r"dmdr-train .*--model (?!toy|digits)\S+[/:].*": "a model of the hub, or a checkpoint",
    r"dmdr-eval .*--(benchmark|output_dir) .*": "networks that are not here; tests/plugins runs each benchmark",
    r"dmdr-sample .*--(resolution|guidance_scale) .*": "a model of the hub, or of large images",
    r"python -m examples\.ablation_matrix (?!--dry_run).*": "an hour; test_ablation_run.py runs it on the toy",
}
EXECUTED = {
    r"dmdr-train.*": "of one update a stage, on the toy where it can",
    r"dmdr-sample .*": "",
    r"dmdr-eval .*": "on the small checkpoints of the digits",
    r"dmdr-plugins": "",
    r"python -m examples\.ablation_matrix --dry_run": "",
}
CLASSES = {"excepted": EXCEPTED, "parsed": PARSED, "executed": EXECUTED}

SHORT: dict[str, Any] = {
    "stage1_steps": 1,
    "stage2_steps": 1,
    "fake_updates": 1,
    "per_device_train_batch_size": 4,
    "sample_images": 2,
    "teacher_steps": 2,
    "num_eval_samples": 0,
    "report_to": "none",
}
HUB = {  # the pipeline of each model of the hub, which cannot be asked here; others are StableDiffusion3Pipelines
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
    "black-forest-labs/FLUX.2-klein-base-4B": "Flux2KleinPipeline",
    "Qwen/Qwen-Image": "QwenImagePipeline",
    "krea/Krea-2-Raw": "Krea2Pipeline",
    "Tongyi-MAI/Z-Image": "ZImagePipeline",
    "black-forest-labs/FLUX.2-klein-4B": "Flux2KleinPipeline",
}
# Runs that later commands sample, and rewards that are networks, need images of digits.
DIGITS = re.compile(r"--output_dir runs/(demo|lora)$|hps|clip")


@dataclass(frozen=True)
class Command:
    """A command line of a document, without its comment."""

    document: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)

    @property
    def kind(self) -> str:
        """Its class; empty for one that nothing knows."""
        found = (kind for kind, patterns in CLASSES.items() if any(re.fullmatch(p, self.line) for p in patterns))
        return next(found, "")


def blocks(document: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def commands(document: str) -> list[Command]:
    """The lines of its `sh` blocks in order; continued lines are one."""
    found = []
    for language, content in blocks(document):
        for line in content.replace("\\\n", " ").splitlines() if language == "sh" else ():
            words = shlex.split(line, comments=True)
            if words:
                end = len(line) if "#" not in words and " #" not in line else line.index(" #")
                found.append(Command(document, " ".join(line[:end].split())))
    return found


ALL = [command for document in DOCUMENTS for command in commands(document)]


# --- What is written --------------------------------------------------------------------------------------------------


def test_every_command_has_a_class_and_every_class_a_command() -> None:
    assert not [command for command in ALL if not command.kind]
    first: dict[str, Command] = {}
    for command in ALL:
        pattern = next(p for p in CLASSES[command.kind] if re.fullmatch(p, command.line))
        first.setdefault(pattern, command)
    assert first.keys() == EXCEPTED.keys() | PARSED.keys() | EXECUTED.keys()


@pytest.mark.parametrize("document", [*DOCUMENTS, *COVERED])
def test_no_command_stands_outside_of_a_sh_block(document: str) -> None:
    text = (ROOT / document).read_text()
    assert {language for language, _ in blocks(document)} <= LANGUAGES
    assert all(c.line.startswith(PROGRAMS) for c in commands(document))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in prose.splitlines() if re.match(rf"(    |\t)\s*({'|'.join(PROGRAMS)})", line)]


@pytest.mark.parametrize("command", [c for c in ALL if c.kind == "excepted"], ids=lambda c: c.line)
def test_what_an_excepted_command_names_is_there(command: Command) -> None:
    program, *words = command.words
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if program == "python":
        assert (ROOT / words[0]).is_file()


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every name in the code."""
    files = (file for folder in ("dmdr", "plugins", "examples") for file in (ROOT / folder).rglob("*.py"))
    return {name for file in files for name in re.findall(r"\w+", file.read_text())}


@pytest.mark.parametrize("document", [*DOCUMENTS, *COVERED])
def test_flags_in_the_text_exist(document: str, known: set[str]) -> None:
    """A flag is the name of a field, perhaps after that of its plugin."""
    prose = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    others = {"dmdr_plugin", "dmdr_model", "dmdr_option", "no_deps", "num_processes"}  # of pytest, pip, accelerate
    others |= {"shutdown_timeout", "signals_to_handle"}  # of torchrun
    for flag in {flag.replace("-", "_") for flag in re.findall(r"--(\w[\w-]*\w)", prose)} - others:
        parts = flag.split("_")
        assert any("_".join(parts[start:]) in known for start in range(len(parts))), flag


def anchors(file: Path) -> set[str]:
    """Anchors of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", LINKED)
def test_links_lead_somewhere(document: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = ROOT / document if not path else (ROOT / document).parent / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# --- What is run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_digits(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, which stands in for those of models that are not here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        return dmdr.train(model="digits", **SHORT, output_dir=str(tmp_path_factory.mktemp("runs") / "digits"))


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> Path:
    """A folder with what the documents take for granted: the examples, prompts, two images that nobody drew."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "prompts.txt").write_text("a handwritten seven\na handwritten two\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "seven", "label": 7}\n{"prompt": "two", "label": 2}\n')
    (tmp_path / "photos").mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8), (90 * index, 0, 0)).save(tmp_path / "photos" / f"{index:04d}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "pipeline_class", pipeline_class)
    return tmp_path


def pipeline_class(folder: str, revision: str | None = None) -> str:
    """That of a folder, or of a model of the hub."""
    if Path(folder).exists():
        return str(json.loads((Path(folder) / "model_index.json").read_text())["_class_name"])
    return HUB.get(folder, "StableDiffusion3Pipeline")


def flags(**settings: Any) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def shortened(command: Command) -> list[str]:
    """The flags of `dmdr-train`, then those that make it short."""
    given = command.words[1:]
    here = {} if DIGITS.search(command.line) or {"--model", "--config"} & set(given) else {"model": "toy"}
    settings = SHORT | here
    if "--eval_reward" in given:
        settings |= {"num_eval_samples": 8, "eval_steps": 1}
    if "grpo" in command.line:
        settings |= {"num_generations": 2}
    unread_with = {"--init_student": "stage1_steps", "--stage1_steps 0": "stage1_steps", "--dmd_weight": "fake_updates"}
    for other, unread in unread_with.items():
        if other in command.line:
            settings = {name: value for name, value in settings.items() if name != unread}
    if "--resume_from_checkpoint" in given:  # with the settings of its run, but longer
        settings = {"stage2_steps": 2}
    return [*given, *flags(**settings)]


def train(command: Command) -> None:
    if "--help" in command.words:
        with pytest.raises(SystemExit) as done:
            train_command.run(command.words[1:])
        assert done.value.code == 0
        return
    parse(command.words[1:])
    train_command.run(shortened(command))


def ablate(command: Command) -> None:
    importlib.import_module("examples.ablation_matrix.__main__").ablate(command.words[3:])


EXECUTE: dict[str, Callable[[Command], None]] = {
    "dmdr-train": train,
    "dmdr-sample": lambda command: sample.run(command.words[1:]),
    "dmdr-eval": lambda command: eval_command.run(
        [*command.words[1:], *(["--model", "digits"] if "--reward" in command.words else [])]
    ),
    "dmdr-plugins": lambda command: plugins_command.run(command.words[1:]),
    "python": ablate,
}


def parse_only(command: Command) -> str | None:
    """Read its flags; where a run would go, if it says so."""
    program, *words = (word for word in command.words if not word.startswith("WORLD_SIZE="))
    if program == "dmdr-reward-server":
        parse_command(reward_server.ServerFlags, words, prog=program, description="")
        return None
    if program == "python":
        importlib.import_module("examples.ablation_matrix.__main__").flags(words[2:])
        return None
    if program == "dmdr-sample":
        sample.check(sample.arguments().parse_args(words))
        return None
    if "dmdr.cli.eval" in words:
        words, program = words[words.index("dmdr.cli.eval") + 1 :], "dmdr-eval"
    if program == "dmdr-eval":
        eval_command.read(words)
        return None
    return parse(words[words.index("dmdr.cli.train") + 1 :] if "dmdr.cli.train" in words else words).config.output_dir


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_work(
    document: str, room: Path, run_of_digits: Path, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, on its own files; then its Python."""
    if "--eval_reward" in (ROOT / document).read_text():  # whose checkpoints are trained on first use
        monkeypatch.setenv("DMDR_DIGITS_BUDGET", "0.02")
    python = [content for language, content in blocks(document) if language == "python"]
    for content in python:
        compile(content, document, "exec")
        if name := re.match(r"# (\w+\.py)\n", content):
            (room / name[1]).write_text(content)
    for command in commands(document):
        print(f"$ {command.line}")
        if command.kind == "executed":
            EXECUTE[command.words[0]](command)
        elif command.kind == "parsed":
            folder = parse_only(command)
            if folder and not Path(folder).exists():
                shutil.copytree(run_of_digits, folder)
    for content in python:
        if not content.startswith("# "):
            here = f'"{digits.folder()}", torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None'
            content = re.sub(r'"stabilityai/[^)]*torch\.bfloat16', here, content)
            monkeypatch.setattr(dmdr, "train", partial(dmdr.train, **SHORT))
            exec(content, {})
