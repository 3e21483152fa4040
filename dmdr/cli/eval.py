"""`dmdr-eval`: benchmarks of runs, exports, pipelines and folders of images."""

import sys
import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dmdr.cli.common import command, find_device, open_rewards
from dmdr.errors import ConfigError
from dmdr.settings.chosen import Chosen
from dmdr.settings.fields import REQUIRED, RewardFlags, flag
from dmdr.settings.parse import parse_command

if TYPE_CHECKING:
    from accelerate import PartialState

    from dmdr.evaluation.tables import Measured, Table
    from dmdr.prompts import Row
    from dmdr.rewards import Rewards
    from dmdr.run.benchmarking import Examination, Found, Subject

PATIENCE = timedelta(minutes=30)  # with the other processes, as `dmdr-train` has by default
DESCRIPTION = (
    "Measure runs, exports, pipelines or folders of images by a benchmark, and print a table: dmdr-eval RUN PIPELINE "
    "FOLDER --benchmark NAME. Rewards resize as their published evaluations do."
)
NOTHING_DRAWN = "nothing is drawn"
WHY = {  # else, why a flag is not read
    "guidance_scale": "neither a pipeline nor a teacher draws",
    "model": "there are no rewards, and the benchmark asks no model",
    "reference_images": "the benchmark compares with no images",
}
COMPARE = "compare"
COMPARISON = "dmdr-eval compare A B teacher writes a page of their images side by side, and what --benchmark measures."


@dataclass(kw_only=True)
class EvalFlags(RewardFlags):
    """The flags of the command."""

    subjects: list[str] = flag(
        REQUIRED,
        "what is measured; also written first, without this flag: run folders, exports, pipelines (folders or hub "
        "ids), folders of images, .npz files of images, or 'teacher', that of the first run; NAME=PLACE names one, and "
        "several of one NAME are repetitions, such as seeds",
    )
    of_rewards = "preference"  # what is measured where rewards alone are named; not annotated, hence no flag
    benchmark: str = flag(of_rewards, "what is measured; --benchmark NAME --help adds the flags of NAME")
    reward: str | None = flag(None, "sum of rewards, e.g. 'hps+0.5*clip', of a benchmark that scores by them")
    prompts: str | None = flag(
        None,
        "the benchmark's prompts: a file, folder or dataset in its published layout; may be left out for a folder of "
        "images that has them beside it, as dmdr-sample writes it, and for a run of a registered model with prompts",
    )
    prompt_column: str = flag("prompt", "column that holds the prompts; rewards are given the others by name")
    baseline: str | None = flag(None, "name of the one that the others are compared with, prompt by prompt")
    output_dir: str | None = flag(
        None,
        "folder of the images, the answers and the tables, where what is there is kept; by default evaluation/ in the "
        "first run's folder, or else here",
    )
    reference_images: str | None = flag(
        None,
        "images that those measured are compared with, by a benchmark that does so: a folder, an .npz file, or a "
        "dataset (NAME, or NAME:SPLIT)",
    )
    batch_size: int = flag(16, "images that are looked at at a time")
    draw_batch_size: int = flag(16, "images that are drawn at a time; with another number they are others")
    images_per_prompt: int | None = flag(None, "images that are drawn of each prompt; the benchmark's own by default")
    num_inference_steps: list[int] | None = flag(
        None, "steps of what is drawn; of several numbers each is measured; the student's own, or 28, by default"
    )
    guidance_scale: float | None = flag(None, "guidance of a pipeline, which needs it, or of a teacher")
    seed: int = flag(0, "seed of what is drawn, as torch.manual_seed takes it")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = flag(
        None, "precision of the networks that draw; the run's by default"
    )

    def validate(self) -> None:
        super().validate()
        for name in ("batch_size", "draw_batch_size", "images_per_prompt"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "at least 1")
        steps = self.num_inference_steps
        self._require(steps is None or all(1 <= each <= 1000 for each in steps), "num_inference_steps", "1 to 1000")
        self._require(-(2**63) <= self.seed < 2**64, "seed", "between -2**63 and 2**64 - 1")
        scale = self.guidance_scale
        self._require(scale is None or 0 <= scale <= 1000, "guidance_scale", "between 0 and 1000")


@dataclass(kw_only=True)
class CompareFlags(EvalFlags):
    """Those of `dmdr-eval compare`."""

    benchmark: str = flag("none", "what is measured as well; with --reward alone it is 'preference'")
    max_rows: int = flag(100, "prompts on the page; of more, those with the largest differences and some at random")

    def validate(self) -> None:
        super().validate()
        self._require(self.max_rows >= 1, "max_rows", "at least 1")


def read(arguments: Sequence[str]) -> "tuple[EvalFlags, tuple[Chosen, ...]]":
    """The flags of a command line, and the plugins that it names.

    Raises:
        ConfigError: For anything unknown, malformed or missing.
        SystemExit: After printing `--help`.
    """
    compares = list(arguments[:1]) == [COMPARE]
    arguments = arguments[compares:]
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    if count and any(argument.split("=")[0] == "--subjects" for argument in arguments):
        raise ConfigError("--subjects: name all that is measured first, or all by this flag")
    first = ["--subjects", *arguments[:count]] if count else []
    kind, name = (CompareFlags, f"dmdr-eval {COMPARE}") if compares else (EvalFlags, "dmdr-eval")
    about = f"{DESCRIPTION} {COMPARISON}"
    return parse_command(kind, [*first, *arguments[count:]], prog=name, description=about)


def run(arguments: list[str]) -> None:
    flags, plugins = read(arguments)
    # torch is imported only after the flags have been found good
    from dmdr.run.device import avoid_mps, join_processes

    avoid_mps()
    state = join_processes(cpu=flags.device == "cpu", timeout=PATIENCE)
    try:
        benchmark = next((plugin for plugin in plugins if plugin.group == "benchmarks"), None)
        evaluate(flags, benchmark, [plugin for plugin in plugins if plugin.group == "rewards"], state)
    finally:
        state.destroy_process_group()  # or a thread between processes may outlive the interpreter, and abort it


def evaluate(flags: EvalFlags, plugin: Chosen | None, chosen: Sequence[Chosen], state: "PartialState") -> None:
    """Measure everything in all processes, each a share; the main one checks what is asked for, writes and prints.

    Args:
        plugin: The benchmark; None for images alone.
        chosen: Its rewards.
    """
    from dmdr.benchmarks import prompts_of
    from dmdr.evaluation.tables import Measured, Table
    from dmdr.run import benchmarking
    from dmdr.run.device import on_main_process

    warnings.filterwarnings("ignore", module="PIL")  # of palettes with transparency, and of large images
    subjects = benchmarking.subjects_of(flags.subjects, flags.num_inference_steps)
    check(flags, subjects, plugin, chosen)
    output = Path(flags.output_dir) if flags.output_dir else benchmarking.place_of_results(subjects)
    on_main_process(state, lambda: require_folder(output))
    examination = opened(flags, plugin, chosen, state, output)
    found = images_of(flags, examination, subjects, chosen)
    if plugin:
        measured = measure(flags, examination, found, chosen)
    else:
        measured = [Measured(subject.name, {}, prompts_of(rows)) for subject, _, rows in found]
    if state.is_main_process:
        baseline = next((one for one in measured if one.name == flags.baseline), None)
        table = Table(examination.benchmark.about(), measured, baseline)
        report(flags, examination, table, found)


def images_of(
    flags: EvalFlags, examination: "Examination", subjects: "Sequence[Subject]", chosen: Sequence[Chosen]
) -> "list[Found]":
    """Each subject with its images and their prompt rows; what is missing has been drawn."""
    from dmdr.run import benchmarking
    from dmdr.run.device import free_memory
    from dmdr.settings.verify import check_columns

    benchmark = examination.benchmark
    each = flags.images_per_prompt or benchmark.images_per_prompt
    if benchmark.layout == "grids" and each != 4:
        what = f"benchmark '{examination.title}' draws grids of 4 images"
        raise ConfigError(f"--images_per_prompt {each}: {what}; leave it out")
    asked = benchmarking.Asked(
        flags.prompts,
        flags.prompt_column,
        each,
        flags.draw_batch_size,
        flags.seed,
        flags.guidance_scale,
        flags.mixed_precision,
    )
    readers = [one.cls for one in chosen] + [type(benchmark)]
    unread = not any(getattr(cls, "reads_prompts", True) for cls in readers)
    found = [(subject, *examination.find(subject, asked, unread)) for subject in subjects]
    for _, _, rows in found:
        check_columns(chosen, rows)
    if isinstance(flags, CompareFlags):
        benchmarking.require_same_prompts(found)
    _ = examination.reference  # what is none is refused before networks are loaded
    due = [one for one in found if one[0].drawn and not examination.drawn(one[1])]
    if due:  # and what cannot be measured, before hours of drawing
        prepare(flags, copy(benchmark), chosen, first_rows(found), examination.state)
        free_memory()
    for subject, pictures, rows in due:
        examination.draw(subject, pictures, rows, asked)
    return found


def first_rows(found: "Sequence[Found]") -> "list[Row]":
    """The first prompt row of each subject."""
    return [row for _, _, rows in found for row in rows[:1]]


def measure(
    flags: EvalFlags, examination: "Examination", found: "Sequence[Found]", chosen: Sequence[Chosen]
) -> "list[Measured]":
    """The figures of each subject in the main process; none in the others."""
    from dmdr.run.benchmarking import REFERENCE

    device = prepare(flags, examination.benchmark, chosen, first_rows(found), examination.state)
    against = examination.reference
    other = examination.ask(REFERENCE, *against, device) if against else None
    stores = [examination.ask(subject.folder, pictures, rows, device) for subject, pictures, rows in found]
    if not examination.state.is_main_process:
        return []
    return [examination.measured(*one, store, other) for one, store in zip(found, stores, strict=True)]


def report(flags: EvalFlags, examination: "Examination", table: "Table", found: "Sequence[Found]") -> None:
    """Write and print what was found; in the main process alone."""
    from dmdr.evaluation.report import write_report
    from dmdr.run import benchmarking

    output, measured = examination.output, bool(table.columns())
    written = examination.write(table) if measured else []
    if isinstance(flags, CompareFlags):
        written.append(benchmarking.compared(table, found, output, f"seed {flags.seed}", flags.max_rows))
    if benchmarking.is_run(output.parent):
        write_report(output.parent)  # which links to what there is now
    if measured:
        print(table.as_text() + "\n")
    print(f"saved as {', '.join(map(str, written))}")
    benchmarking.require_answers(table)


def check(flags: EvalFlags, subjects: "Sequence[Subject]", plugin: Chosen | None, chosen: Sequence[Chosen]) -> None:
    """Refuse flags that contradict each other, or that nothing reads.

    Raises:
        ConfigError: Names the flag.
    """
    from dmdr.run import benchmarking

    names = [subject.name for subject in subjects]
    if flags.baseline and (flags.baseline not in names or not plugin):
        what = f"is none of what is measured: {', '.join(names)}" if plugin else "is not read without a benchmark"
        raise ConfigError(f"--baseline {flags.baseline} {what}")
    if isinstance(flags, CompareFlags) and len(names) < 2:
        raise ConfigError(f"compare: give two or more; there is {names[0]} alone")
    repeated = {name for name in names if names.count(name) > 1}
    if flags.baseline in repeated or (repeated and isinstance(flags, CompareFlags)):
        raise ConfigError("repetitions cannot be compared image by image: give each another NAME")
    drawn = [subject for subject in subjects if subject.drawn]
    guided = [subject for subject in drawn if subject.teacher or benchmarking.is_pipeline(subject.place)]
    of_drawing = ("seed", "num_inference_steps", "images_per_prompt", "mixed_precision", "draw_batch_size")
    readers: dict[str, object] = {
        **dict.fromkeys(of_drawing, drawn),
        "guidance_scale": guided,
        "model": chosen or (plugin and hasattr(plugin.cls, "ask")),
        "reference_images": plugin and hasattr(plugin.cls, "compared_with"),
    }
    for name, reader in readers.items():
        if not reader and getattr(flags, name) != getattr(EvalFlags, name):
            raise ConfigError(f"--{name} is not read here: {WHY.get(name, NOTHING_DRAWN)}; leave it out")


def opened(
    flags: EvalFlags, plugin: Chosen | None, chosen: Sequence[Chosen], state: "PartialState", output: Path
) -> "Examination":
    """The benchmark that is asked for, not prepared."""
    from dmdr.run import benchmarking
    from dmdr.settings import registry

    model = registry.load("models", flags.model)() if flags.model else None
    benchmark: Any = plugin.called(plugin.cls, plugin.values(flags)) if plugin else benchmarking.ImagesAlone()
    benchmarking.ask_model(benchmark, model)
    settings: dict[str, Any] = {"dmdr": version("dmdr"), "dtype": flags.dtype, "model": flags.model}
    settings["asked"] = [benchmarking.dependencies(one) for one in [*([plugin] if plugin else []), *chosen]]
    settings["compares"] = flags.reference_images is not None
    title = plugin.title if plugin else "images"
    return benchmarking.Examination(benchmark, title, settings, state, output, flags.batch_size)


def prepare(flags: EvalFlags, benchmark: Any, chosen: Sequence[Chosen], rows: "Sequence[Row]", state: Any) -> Any:
    """Load what the benchmark asks, and return the device."""
    from dmdr.benchmarks import ScoresByRewards
    from dmdr.evaluation import answers
    from dmdr.run.device import failing_together
    from dmdr.types import dtype_of

    device = None
    for turn in (True, False):  # the main process first, which downloads or builds what the others then find
        with failing_together():
            if state.is_main_process == turn:
                device = find_device(flags.device)
                if chosen and isinstance(benchmark, ScoresByRewards):
                    rewards: Rewards
                    rewards, device = open_rewards(flags, chosen, rows)
                    benchmark.use(rewards)
                answers.prepare(benchmark, flags.benchmark, device, dtype_of(flags.dtype))
    return device


def require_folder(output: Path) -> None:
    """Refuse a place for the tables that cannot be had, before anything is computed."""
    from dmdr.images import can_hold_files

    nearest = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.exists())
    if not nearest.is_dir() or not can_hold_files(nearest):
        raise ConfigError(
            f"--output_dir {output} cannot be written: {nearest} is no folder, or you may not write into it"
        )


def main() -> None:
    sys.exit(command(run))


if __name__ == "__main__":
    main()
