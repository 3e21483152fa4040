"""The course of an evaluation: images drawn or found, a benchmark asked about them, and its table."""

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from dmdr import images
from dmdr.benchmarks import (
    Answers,
    AsksTheModel,
    Benchmark,
    BringsRows,
    ComparesWithImages,
    Figure,
    Layout,
    prompts_of,
)
from dmdr.errors import ConfigError, TrainingError
from dmdr.evaluation import layouts
from dmdr.evaluation.answers import Store, ask
from dmdr.evaluation.comparison import Shown, write_comparison
from dmdr.evaluation.pictures import Files, Pictures, pictures_in
from dmdr.evaluation.report import LATER
from dmdr.evaluation.tables import Measured, Table, as_csv
from dmdr.prompts import Row, read_prompts
from dmdr.protocols import NamedModel
from dmdr.run.device import failing_together, free_memory, on_main_process, rounds
from dmdr.run.drawing import export_in, is_pipeline, open_place, require_guidance, weights_in
from dmdr.run.examiner import TEACHER
from dmdr.run.signals import Interrupts
from dmdr.settings import registry
from dmdr.settings.chosen import Chosen
from dmdr.settings.parse import read_yaml

REFERENCE = "reference"  # the folder of what is compared with
DRAWN = ".drawn"  # beside images: all are there
MOST = 100_000  # images of a subject that are drawn


@dataclass(frozen=True)
class Subject:
    """Something whose images are looked at.

    Attributes:
        name: What it is called in the table.
        folder: That of its files, unlike any other's.
        place: A run, an export, a pipeline, a folder of images or an .npz file.
        drawn: Whether its images are drawn.
        teacher: Whether the run's teacher draws.
        num_inference_steps: Steps; None for its own.
    """

    name: str
    folder: str
    place: str
    drawn: bool
    teacher: bool = False
    num_inference_steps: int | None = None


Found = tuple[Subject, Pictures, list[Row]]  # with its images and the prompt row of each


def place_of_results(subjects: Sequence[Subject]) -> Path:
    """Where the tables go if nobody says it: into the first run's folder, or here."""
    runs = [Path(subject.place) for subject in subjects if is_run(Path(subject.place))]
    return runs[0] / LATER if runs else Path(LATER)


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a run."""
    return (folder / "config.yaml").is_file() and export_in(str(folder)) is not None


@dataclass
class ImagesAlone:
    """A `Benchmark` that measures nothing: images are drawn, and shown."""

    images_per_prompt: ClassVar[int] = 1
    layout: ClassVar[Layout] = "flat"
    reads_prompts: ClassVar[bool] = False

    def about(self) -> str:
        return "Images alone."

    def rows(self, prompts: str, column: str) -> Sequence[Row]:
        return read_prompts(prompts, column=column, repeated=True).rows

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        return {}

    def figures(
        self, answers: Answers, rows: Sequence[Mapping[str, Any]], reference: Answers | None
    ) -> Mapping[str, Figure]:
        return {}


def subjects_of(places: Sequence[str], steps: Sequence[int] | None) -> list[Subject]:
    """What a command line names.

    Args:
        places: `PLACE` or `NAME=PLACE`; several of one NAME are repetitions, such as seeds. `teacher` is that of the
            first run.
        steps: Numbers of sampling steps of which each draws; its own by default.

    Raises:
        ConfigError: If one is not there, two have the same name by chance, or there is no run for the teacher.
    """
    found: list[Subject] = []
    unnamed: list[str] = []
    for typed in places:
        named = None if Path(typed).exists() else re.fullmatch(r"([^=/\\]+)=(.+)", typed)
        name, place = named.groups() if named else (None, typed)
        teacher = place == TEACHER and not Path(place).exists()
        if teacher:
            runs = [subject.place for subject in found if subject.drawn and export_in(subject.place)]
            if not runs:
                raise ConfigError("teacher: name a run before it, whose teacher it is")
            place = runs[0]
        if not Path(place).exists() and not is_pipeline(place):
            raise ConfigError(f"no such folder: {place}")
        if Path(place).is_file() and Path(place).suffix != ".npz":
            raise ConfigError(
                f"{place} is a file: give a run, a pipeline, a folder of images, or an .npz file of images"
            )
        drawn = teacher or export_in(place) is not None or is_pipeline(place)
        called = name or (TEACHER if teacher else _called(place))
        counts = steps if drawn and steps else [None]
        for count in counts:
            own = called if len(counts) == 1 else f"{called}-{count}"
            unnamed += [] if named else [own]
            again = sum(subject.name == own for subject in found)
            folder = _plain(own) + (f"-{again + 1}" if again else "")
            found.append(Subject(own, folder, place, drawn, teacher, count))
    for key, values in (("name", unnamed), ("folder", [subject.folder for subject in found])):
        names = [getattr(subject, key) for subject in found]
        if twice := [value for value in values if names.count(value) > 1]:
            raise ConfigError(f"two of what is evaluated are called {twice[0]}: write NAME=PLACE")
    if any(subject.folder == REFERENCE for subject in found):
        raise ConfigError(f"{REFERENCE} is no name for what is evaluated: write NAME=PLACE")
    return found


def prompts_of_model(place: str) -> list[Row]:
    """The prompts of the registered model that a run has trained.

    Raises:
        ConfigError: If the place is no such run.
    """
    file = Path(place) / "config.yaml"
    settings = read_yaml(str(file)) if file.is_file() else {}
    name = str(settings.get("model"))
    if registry.is_installed("models", name) and not settings.get("prompts"):
        return [dict(row) for row in registry.load("models", name)().prompts()]
    trained = f" (it was trained on {settings['prompts']})" if settings.get("prompts") else ""
    raise ConfigError(f"--prompts is missing: {place} draws images of them{trained}")


def _called(place: str) -> str:
    path = Path(place)
    path = path.parent if path.name == "student" and export_in(place) == path else path
    return path.absolute().name.removesuffix(".npz") or "images"


def _plain(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.+-]", "_", name)


@dataclass(frozen=True)
class Asked:
    """For which images a user asks.

    Attributes:
        prompts: Where the prompt rows are; None for those that lie beside images, or that the benchmark brings.
        column: That of the prompts.
        each: Images that are drawn of each prompt.
        batch_size: Images that are drawn at a time.
        seed: Of torch's generator.
        guidance_scale: Of pipelines and teachers; None for that of the run.
        mixed_precision: Of the networks that draw; None for that of the run.
    """

    prompts: str | None
    column: str
    each: int
    batch_size: int
    seed: int
    guidance_scale: float | None
    mixed_precision: str | None


@dataclass(frozen=True)
class Examination:
    """A benchmark in one or several processes; all must call `find`, `drawn`, `draw`, `ask` and `reference` together.

    Attributes:
        benchmark: The benchmark, not prepared.
        title: What users call it.
        settings: What its answers depend on, beside the images and their rows.
        state: The processes.
        output: Folder of all that is written.
        batch_size: Images that are asked about at a time.
    """

    benchmark: Benchmark
    title: str
    settings: dict[str, Any]
    state: PartialState
    output: Path
    batch_size: int

    @property
    def label(self) -> str:
        """The title as the name of a file."""
        return self.title.replace("/", "_")

    def find(self, subject: Subject, asked: Asked, unread: bool) -> tuple[Pictures, list[Row]]:
        """The images of a subject, which may still have to be drawn, and the prompt row of each.

        Args:
            asked: For which images.
            unread: Nobody reads the prompts.

        Raises:
            ConfigError: If there are none, or they do not fit together.
        """
        folder, layout = self.output / subject.folder, self.benchmark.layout

        def rows(where: str) -> list[Row]:
            return [dict(row) for row in self.benchmark.rows(where, asked.column)]

        def found() -> tuple[Pictures, list[Row]]:
            if not subject.drawn:
                return layouts.find(
                    Path(subject.place),
                    layout,
                    asked.prompts,
                    rows,
                    column=asked.column,
                    unread=unread,
                    kept=folder / "prompts.jsonl",
                )
            require_guidance(subject.place, asked.guidance_scale)
            if asked.prompts is not None:
                prompts = rows(asked.prompts)
            elif isinstance(self.benchmark, BringsRows):
                prompts = [dict(row) for row in self.benchmark.own_rows()]
            else:
                prompts = prompts_of_model(subject.place)
            for row in prompts:
                row.pop("file_name", None)  # of an index: the images get names of their own
            if len(prompts) * asked.each > MOST:
                raise ConfigError(f"{subject.name}: more than {MOST:,} images")
            # Other images have a folder of their own: the answers about these stay with them.
            weights = weights_in(export_in(subject.place) or Path(subject.place))
            about = [prompts, layout, vars(subject), vars(asked), weights, version("dmdr")]
            digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
            place = folder / f"images-{digest[:8]}"
            paths = [place / name for name in layouts.files(layout, len(prompts), asked.each)]
            return Files(place, paths), [row for row in prompts for _ in range(asked.each)]

        return on_main_process(self.state, found)

    def drawn(self, pictures: Any) -> bool:
        """Whether all images of a subject are there.

        Args:
            pictures: As found (`Files`).
        """
        done = pictures.folder / DRAWN
        return on_main_process(self.state, lambda: done.is_file() and all(path.is_file() for path in pictures.paths))

    def draw(self, subject: Subject, pictures: Any, rows: Sequence[Row], asked: Asked) -> None:
        """Draw the images of a subject that are not there.

        Args:
            pictures, rows: As found (`Files`).
        """
        guided = subject.teacher or is_pipeline(subject.place)  # a student is not
        artist = open_place(
            subject.place,
            teacher=subject.teacher,
            guidance_scale=asked.guidance_scale if guided else None,
            num_inference_steps=subject.num_inference_steps,
            mixed_precision=asked.mixed_precision,
        )
        try:
            artist.write(list(rows), asked.seed, pictures.paths, batch_size=asked.batch_size)
        except KeyboardInterrupt:
            if self.state.is_main_process:
                print(f"stopped while {subject.name} was drawn; the same command goes on", file=sys.stderr)
            raise
        del artist
        free_memory()  # before the judges are loaded

        def complete() -> None:
            layouts.complete(self.benchmark.layout, pictures.folder, rows[:: asked.each], asked.each)
            images.write_atomically(pictures.folder / DRAWN, b"")

        on_main_process(self.state, complete)

    def ask(self, name: str, pictures: Pictures, rows: Sequence[Row], device: torch.device) -> Store:
        """Ask about all images of which the answers are not there yet.

        Raises:
            ConfigError, TrainingError: In all processes, if one fails. What was answered until then is kept.
        """
        folder = self.output / name / self.label

        def opened() -> tuple[Store, list[int]]:
            store = Store.of(folder, pictures, rows, self.settings)
            return store, store.due()

        store, due = on_main_process(self.state, opened)
        own = due[self.state.process_index :: self.state.num_processes]
        asked = ask(self.benchmark, self.title, store, pictures, rows, own, batch_size=self.batch_size, device=device)
        total = sum(len(store.indices(shard)) for shard in due)
        main = self.state.is_main_process
        bar = tqdm(total=total, desc=f"ask about {name}", unit="image", leave=False, disable=None if main else True)
        with Interrupts(self.state) as interrupts:  # a launcher ends all when one has left, while others still write
            try:
                with bar, closing(asked):
                    for counts in rounds(asked):
                        bar.update(sum(counts))
                        if interrupts.arrived():
                            interrupts.leave()
            except BaseException:  # a signal, too
                kept = len(store) - sum(len(store.indices(shard)) for shard in store.due())
                if main and kept:
                    said = f"the answers about {kept} of {len(store)} images are kept in {folder}"
                    print(f"{said}; the same command goes on", file=sys.stderr)
                raise
        return store

    @cached_property
    def reference(self) -> tuple[Pictures, list[Row]] | None:
        """The images that the benchmark compares with, if there are any."""

        def found() -> tuple[Pictures, list[Row]] | None:
            place = self.benchmark.compared_with() if isinstance(self.benchmark, ComparesWithImages) else None
            if place is None:
                return None
            pictures = pictures_in(place)
            return pictures, [{"prompt": ""}] * len(pictures)

        return on_main_process(self.state, found)

    def measured(self, subject: Subject, pictures: Pictures, rows: Sequence[Row], store: Store, other: Any) -> Measured:
        """The figures of a subject, in the main process alone; its answers as a CSV file."""
        if any(store.names()):
            file = self.output / subject.folder / f"{self.label}.csv"
            images.write_atomically(file, as_csv(pictures, rows, store))
        return Measured(subject.name, self.benchmark.figures(store, rows, other), prompts_of(rows))

    def write(self, table: Table) -> list[Path]:
        """The table in all its forms; returns the files."""
        forms = {"json": table.as_json(), "md": table.as_markdown(), "tex": table.as_latex()}
        paths = [self.output / f"{self.label}.{suffix}" for suffix in forms]
        for path, text in zip(paths, forms.values(), strict=True):
            images.write_atomically(path, text.encode())
        return paths


def compared(table: Table, found: Sequence[Found], output: Path, how: str, max_rows: int) -> Path:
    """Write the page of all subjects side by side; returns its file.

    Args:
        table: Of their figures.
        found: Each with its images and their rows, of the same prompts.
        output: Folder of the page.
        how: In what way images were drawn, for all of them.
        max_rows: Prompts that are shown.
    """
    _, first, rows = found[0]
    asked = [row["prompt"] or first.name(i) for i, row in enumerate(rows)]
    shown = []
    # The baseline first: the page begins with differences to the first, as the table has them.
    order = sorted(zip(found, table.models, strict=True), key=lambda pair: pair[1] is not table.baseline)
    for (subject, pictures, _), model in order:
        steps = f"{subject.num_inference_steps} steps" if subject.num_inference_steps else "its own steps"
        about = f"{subject.place}{', its teacher' if subject.teacher else ''}{f', {steps}, {how}' * subject.drawn}"
        scores = {name: figure.values for name, figure in model.figures.items() if figure.values is not None}
        shown.append(Shown(subject.name, about, pictures, scores))
    page = output / "comparison.html"
    title = " and ".join(subject.name for subject, _, _ in found)
    write_comparison(page, title, asked, shown, table.parts() if table.columns() else (), max_rows=max_rows)
    return page


def require_same_prompts(found: Sequence[Found]) -> None:
    """Refuse to show images of different prompts beside each other.

    Raises:
        ConfigError: Names two.
    """
    first, _, rows = found[0]
    for subject, _, own in found:
        if [row["prompt"] for row in own] != [row["prompt"] for row in rows]:
            raise ConfigError(f"compare: {subject.name} and {first.name} have images of different prompts")


def require_answers(table: Table) -> None:
    """Stop on a figure that no image has an answer for.

    Raises:
        TrainingError: Names it.
    """
    for model in table.models:
        for name, figure in model.figures.items():
            if figure.values is not None and not figure.values.isfinite().any():
                count = len(figure.values)
                raise TrainingError(f"{model.name}: '{name}' is of none of {count} images: no answer is finite")


def dependencies(chosen: Chosen) -> list[Any]:
    """What the answers of a plugin depend on, as far as this machine can tell: its settings, its code, its files."""
    files = [inspect.getsourcefile(chosen.cls) or "", *(str(value) for value in chosen.options.values())]
    known = [path for path in map(Path, files) if "\0" not in str(path) and path.exists()]
    known = [file for path in known for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in known if file.is_file()]
    return [chosen.group, chosen.title, chosen.weight, chosen.options, stamps]


def ask_model(benchmark: Benchmark, model: NamedModel | None) -> None:
    """Give a benchmark the named model, if it asks for one."""
    if isinstance(benchmark, AsksTheModel):
        with failing_together():
            benchmark.ask(model)
