"""`dmdr-eval`: scores of a folder of images."""

import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr.cli.common import command, open_rewards
from dmdr.errors import ConfigError
from dmdr.settings.chosen import Chosen
from dmdr.settings.fields import REQUIRED, RewardFlags, flag
from dmdr.settings.parse import parse_command

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor

PATIENCE = timedelta(minutes=30)  # with the other processes, as `dmdr-train` has by default
DESCRIPTION = "Score a folder of images: a CSV, and a table of means. Rewards resize as their published evaluations do."


@dataclass(kw_only=True)
class EvalFlags(RewardFlags):
    """The flags of the command."""

    images: str = flag(
        REQUIRED,
        "folder of images with a metadata.jsonl as dmdr-sample writes it, or by natural order of name (2.png before "
        "10.png); alpha and EXIF rotation do not count",
    )
    prompts: str | None = flag(
        None, "prompt i of image i, if there is no metadata.jsonl: a file, folder or dataset, as dmdr-train reads them"
    )
    prompt_column: str = flag("prompt", "column that holds the prompts; rewards are given the others by name")
    output: str = flag("scores.csv", "CSV file to write")
    batch_size: int = flag(16, "images that are scored at a time")

    def validate(self) -> None:
        super().validate()
        self._require(self.batch_size >= 1, "batch_size", "at least 1")


def run(arguments: list[str]) -> None:
    flags, chosen = parse_command(EvalFlags, arguments, prog="dmdr-eval", description=DESCRIPTION)
    # torch is imported only after the flags have been found good
    from dmdr.run.device import avoid_mps, join_processes

    avoid_mps()
    state = join_processes(cpu=flags.device == "cpu", timeout=PATIENCE)
    try:
        score(flags, chosen, state)
    finally:
        state.destroy_process_group()  # or a thread between processes may outlive the interpreter, and abort it


def score(flags: EvalFlags, chosen: Sequence[Chosen], state: "PartialState") -> None:
    """Score the images in all processes, each a share; the main one checks what is asked for, writes and prints."""
    from tqdm import tqdm

    from dmdr import images
    from dmdr.evaluation import scoring
    from dmdr.run.device import failing_together, on_main_process, rounds, share_of
    from dmdr.run.signals import Interrupts

    warnings.filterwarnings("ignore", module="PIL")  # of palettes with transparency, and of large images
    on_main_process(state, lambda: scoring.require_writable(Path(flags.output)))
    paths, rows = on_main_process(state, lambda: find_pairs(flags, chosen))
    for turn in (True, False):  # the main process first, which downloads or builds what the others then find
        with failing_together():
            if state.is_main_process == turn:
                rewards, device = open_rewards(flags, chosen, rows)
    found: list[scoring.Part] = []

    def write() -> "dict[str, Tensor]":
        indices, scores = scoring.joined(found)
        scores["total"] = rewards.total(scores)
        content = scoring.as_csv([paths[i] for i in indices], [rows[i] for i in indices], scores)
        images.write_atomically(Path(flags.output).resolve(), content)  # or the file would take the place of a link
        return scores

    own = share_of(state, len(paths), padded=False)
    scores_of = scoring.score_images(rewards, paths, rows, own, batch_size=flags.batch_size, device=device)
    bar = tqdm(total=len(paths), desc="score", unit="image", leave=False, disable=not state.is_main_process)
    with Interrupts(state) as interrupts:  # a launcher ends all when one has left, while the main one still writes
        try:
            with bar, closing(scores_of):
                for parts in rounds(scores_of):
                    found += parts
                    bar.update(sum(len(indices) for indices, _ in parts))
                    if interrupts.arrived():
                        interrupts.leave()
        except BaseException:  # a signal, too
            if found and state.is_main_process:
                count = len(write()["total"])
                print(f"the scores of {count} of {len(paths)} images are saved in {flags.output}", file=sys.stderr)
            raise
    if state.is_main_process:
        scores = write()
        print(scoring.table(scores))
        print(f"\nsaved as {flags.output}")
        rewards.require_finite(scores)


def find_pairs(flags: EvalFlags, chosen: Sequence[Chosen]) -> tuple[list[Path], list[dict[str, Any]]]:
    """The images, and a prompt row for each: by the folder's index, or in order.

    With neither an index nor `--prompts` it is the empty prompt, if no reward reads it.

    Raises:
        ConfigError: If there are more or fewer prompts than images, or a reward asks for what they lack.
    """
    from dmdr.evaluation import image_folder
    from dmdr.settings.verify import check_columns

    index = image_folder.find_index(flags.images)
    if index and flags.prompts is not None:
        raise ConfigError(f"--prompts {flags.prompts}: {index} already has the prompts; leave out --prompts")
    if index:
        paths, rows = image_folder.indexed_images(index, flags.prompt_column)
    else:
        paths = image_folder.find_images(flags.images)
        rows = rows_in_order(flags, chosen, len(paths))
    check_columns(chosen, rows)
    return paths, rows


def rows_in_order(flags: EvalFlags, chosen: Sequence[Chosen], count: int) -> list[dict[str, Any]]:
    """As many prompt rows as there are images.

    Raises:
        ConfigError: If there are more or fewer, or none although a reward reads them.
    """
    from dmdr.prompts import read_prompts

    rows: Sequence[dict[str, Any]] = [{"prompt": ""}] * count
    if flags.prompts is None and flags.prompt_column != "prompt":
        raise ConfigError("--prompt_column is not read without --prompts or a metadata.jsonl; leave it out")
    if flags.prompts is not None:
        rows = read_prompts(flags.prompts, column=flags.prompt_column, repeated=True).rows
    if len(rows) != count:
        raise ConfigError(
            f"--images {flags.images} holds {count} images, but --prompts {flags.prompts} has {len(rows)} prompts "
            "(blank lines do not count)"
        )
    for reward in chosen:
        if flags.prompts is None and getattr(reward.cls, "reads_prompts", True):
            raise ConfigError(f"--prompts is missing: reward '{reward.title}' reads the prompt of each image")
    return list(rows)


def main() -> None:
    sys.exit(command(run))


if __name__ == "__main__":
    main()
