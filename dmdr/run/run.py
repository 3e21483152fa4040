"""A run: the stages of its plan, one after the other, with log, images, evaluation, checkpoints, export and report."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from tqdm import tqdm

from dmdr import images
from dmdr.errors import ConfigError, TrainingError, not_exiting, one_line
from dmdr.evaluation.names import logged
from dmdr.evaluation.report import write_report
from dmdr.protocols import CachesPrompts, Shardable, StartsElsewhere, sizes_of
from dmdr.run import durable
from dmdr.run.checkpoint import (
    Progress,
    checkpoints,
    holds,
    load_parameters,
    number_of,
    read_progress,
)
from dmdr.run.device import avoid_mps, join_processes, mesh_of, on_main_process, open_accelerator, refuse_other_engines
from dmdr.run.export import export
from dmdr.run.folder import (
    INPUTS,
    SETTINGS,
    changes,
    check_inputs_survive,
    check_there,
    check_unchanged,
    choose_folder,
    claimed,
    empty,
    inputs_of,
    never_trained,
)
from dmdr.run.initial import differences
from dmdr.run.job import Job, assemble, find_start, own_prompts
from dmdr.run.keeper import Keeper
from dmdr.run.log import RunLog, beside_the_bar
from dmdr.run.observer import Observer
from dmdr.run.overview import NOTHING_TO_MEASURE, overview
from dmdr.run.pace import Pace
from dmdr.run.plan import Stage
from dmdr.run.real_images import captions
from dmdr.run.signals import Interrupts
from dmdr.run.trainers import Trainers
from dmdr.run.upload import Upload, open_upload
from dmdr.run.watch import Watch
from dmdr.settings.chosen import SUMS
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.settings.parse import Settings, parse
from dmdr.training.objectives import combined_needs
from dmdr.training.trainer import Trainer
from dmdr.types import dtype_of

logger = logging.getLogger("dmdr")
OFTEN = {"sample_steps": "image grids", "eval_steps": "evaluations"}  # what is done every so many updates
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"  # the time left is ours, that of the log


def train(**settings: Any) -> Path:
    """The same as `dmdr-train`, from Python: `train(model=..., rl=..., reward=..., output_dir=...)`.

    Args:
        settings: Any flag of the core or of the chosen plugins, by name.

    Returns:
        The run folder.

    Raises:
        ConfigError: For bad input; nothing was written.
        TrainingError: For a failure in the run; what could be saved was.
        KeyboardInterrupt: After a checkpoint was saved.
    """
    return run(parse(settings=settings))


def run(settings: Settings) -> Path:
    """Train, sample, evaluate, export and report.

    Returns:
        The run folder.

    Raises:
        ConfigError: For `dry_run`, too, which makes no run folder.
    """
    if settings.config.dry_run:
        raise ConfigError("dry_run=True works on the command line only: dmdr-train --dry_run")
    refuse_other_engines()
    avoid_mps()
    config = settings.config
    state = join_processes(timeout=timedelta(seconds=config.ddp_timeout))
    OPTIMIZERS[config.optim].load()
    output, resume = on_main_process(state, lambda: choose_folder(config))
    initial = on_main_process(state, lambda: find_start(settings, resume, state.num_processes))
    upload = on_main_process(state, lambda: open_upload(config, output))
    if not resume and config.overwrite_output_dir:
        parts = [(SUMS.get(part.group, "backend"), part.name) for part in settings.plugins]
        check_inputs_survive(output, [*settings.values().items(), *parts])
    if resume:
        changed = on_main_process(state, lambda: changes(resume, settings.values()))
        for what in changed if state.is_main_process else ():
            logger.warning("--resume_from_checkpoint: %s", what)
    with state.main_process_first():  # which builds what a named model has to build
        job = assemble(settings, state.num_processes)
    if state.is_main_process:
        logger.info("prompts: %s", job.prompts)
    try:
        return Run(job, output, resume, initial, upload)()
    except OSError as error:  # a full disk, a folder that was removed, a process that is gone
        raise TrainingError(f"{error.strerror or one_line(error)}: {error.filename or output}") from error


class Run:
    """One job in one folder."""

    def __init__(
        self, job: Job, output: Path, resume: Path | None, initial: Path | None, upload: Upload | None = None
    ) -> None:
        self.job, self.output, self.resume, self.initial, self.upload = job, output, resume, initial, upload
        self.config = config = job.config
        set_seed(config.seed)
        self.accelerator = open_accelerator(config.mixed_precision, project_dir=str(output))
        self.precision = self.accelerator.mixed_precision
        scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.precision == "fp16")
        self.plan = job.plan
        self.trainers = Trainers(job, self.accelerator, scaler)
        self.observer = Observer(job, self.accelerator, output)
        self.watch = Watch(config, self.accelerator, output)
        self.log = RunLog(output, self.accelerator, config)
        self.pace = Pace(self.accelerator.device)
        self.keeper = Keeper(self.trainers, output, self.pace.sums)
        self.interrupts = Interrupts(self.accelerator)
        self._in_update = False
        self._said: set[str] = set()  # flags that the user has been told about

    # --- The course of a run ---------------------------------------------------------------------------------------

    def __call__(self) -> Path:
        config, accelerator, backend = self.config, self.accelerator, self.job.backend
        if isinstance(backend, CachesPrompts) and self.job.prompts.size is not None:
            backend.cache_prompts(accelerator, self._upcoming_prompts(self.job.prompts.size))
        for rewards in (self.job.rewards, self.job.eval_rewards):  # first, as what they refuse is found soonest
            if rewards:
                rewards.prepare(accelerator.device, dtype_of(config.reward_dtype))
        if self.observer.examiner:
            self.observer.examiner.prepare(self.job.model, dtype_of(config.reward_dtype))
        shared = {"sharding": mesh_of(self.plan.shards, accelerator)} if self.plan.shards > 1 else {}
        backend.prepare(accelerator, roles=self.plan.roles, **shared)
        self._load_initial()
        progress = read_progress(self.resume) if self.resume else Progress(0, 0, 0, 0, self.plan.batch.whole)
        stages = [stage for stage in self.plan.stages if stage.number >= progress.stage]
        first = stages[0]  # whose trainer refuses what misfits, before anything is written
        trainer: Trainer | None = (
            self.keeper.resumed(first, progress.step, self.resume) if self.resume else self.trainers.of(first)
        )
        with self._opened(progress):
            if self.resume and progress.stage == 2:
                self.watch.resume([row["prompt"] for row in self.observer.eval_rows], progress.total)
            self.log.begin(self.job.settings.values())
            bar = tqdm(
                total=self.plan.updates,
                initial=progress.total,
                desc="train",
                disable=not accelerator.is_main_process,
                bar_format=BAR,
            )
            with bar, beside_the_bar():
                for stage in stages:
                    self._train(stage, trainer or self.trainers.of(stage), progress, bar)
                    trainer, progress = None, self.progress  # the optimizers' memory is free for the next stage's
            self._finish()
        return self.output

    @contextmanager
    def _opened(self, progress: Progress) -> Iterator[None]:
        """The run folder, with the plan in it, and no other run at work there."""
        with ExitStack() as claim:

            def open_folder() -> None:
                self.output.mkdir(parents=True, exist_ok=True)
                claim.enter_context(claimed(self.output))
                check_unchanged(self.config, self.output, self.resume)
                self._open_folder(progress)
                self._say_plan()

            on_main_process(self.accelerator, open_folder)
            yield

    def _say_plan(self) -> None:
        """What the run is about to do, into its log and its folder."""
        own = self.trainers.own_learners
        lines = overview(self.job, own, precision=self.precision, device=str(self.accelerator.device))
        for title, text in lines.items():
            logger.info("%s: %s", title, text)
        if self.config.num_eval_samples and not self.observer.measures:
            logger.warning("no evaluation is made: %s", NOTHING_TO_MEASURE)
        images.write_atomically(self.output / "overview.json", (json.dumps(lines, indent=2) + "\n").encode())

    def _upcoming_prompts(self, size: int) -> list[str]:
        """Those that the run will read, of all processes."""
        stream = self.trainers.prompts()
        some = self.plan.batches_read * stream.batch_size < size * stream.group_size
        drawn = stream.first(self.plan.batches_read) if some else self.job.prompts.first(size)
        found = [row["prompt"] for row in (*drawn, *self.observer.rows, *self.observer.eval_rows)]
        return found + own_prompts(self.job.objectives) + self._captions()

    def _captions(self) -> list[str]:
        """Those of the real images that the run may draw."""
        if self.job.real_images is None:
            return []
        plan, uses = self.plan, combined_needs(self.job.objectives).updates_per_rollout
        steps = {"seed": self.config.seed, "updates": plan.updates, "rounds": plan.rounds, "uses": uses}
        return captions(self.job.real_images, **steps, batch=plan.batch.whole)

    def _load_initial(self) -> None:
        backend = self.job.backend
        if self.resume:
            return
        if self.initial is None:
            if isinstance(backend, StartsElsewhere):
                backend.start_student()
            return
        if self.accelerator.is_main_process:
            for what in differences(self.initial, self.plan.num_inference_steps, sizes_of(backend)):
                logger.warning("--init_student %s %s", self.initial, what)
        if (self.initial / "progress.json").is_file():
            role = "ema" if holds(self.initial, "ema") else "student"  # what its users got
            load_parameters(self.initial, role, backend.parameters("student"))
            if "fake_score" in self.plan.roles and holds(self.initial, "fake_score"):
                load_parameters(self.initial, "fake_score", backend.parameters("fake_score"))
            elif "fake_score" in self.plan.roles:
                logger.warning("--init_student %s has no fake score: it starts as the teacher", self.initial)
            for own in self.trainers.own_learners.get("", ()):  # the matching's
                if holds(self.initial, own.name):
                    load_parameters(self.initial, own.name, own.parameters)
        else:
            backend.load_export(self.initial)

    def _open_folder(self, progress: Progress) -> None:
        """Settings in, and nothing beyond the checkpoint that the run resumes from."""
        if not self.resume:
            if held := never_trained(self.output) and self.output.is_dir():
                logger.info("%s held a run that ended before its first update; this one takes its place", self.output)
            if held or self.config.overwrite_output_dir:
                empty(self.output)
        for place in (self.output, self.output / "checkpoints", self.output / "samples"):
            durable.sweep(place)
        images.write_atomically(self.output / SETTINGS, self.job.settings.as_yaml().encode())
        images.write_atomically(self.output / INPUTS, inputs_of(self.job.settings.values()).encode())
        (self.output / "samples").mkdir(exist_ok=True)
        for later in checkpoints(self.output):  # of a branch that this run leaves
            if number_of(later) > progress.total:
                durable.discard(later)
        self.log.forget_after(progress.total)

    def _train(self, stage: Stage, trainer: Trainer, before: Progress, bar: "tqdm[Any]") -> None:
        config = self.config
        trainer.prompts.skip_to(before.prompts_consumed)
        self.progress = self._progress(stage, trainer, before.prompts_consumed)
        if before.stage != stage.number:  # it begins here
            if "reference" in trainer.objectives.needs.roles:
                self.job.backend.snapshot()
            if stage.first_step == 0:
                self._draw_grid()
            if stage.number == 2 and self._guards and not self.watch.before:
                with self.pace.evaluating():
                    self.watch.remember(self.observer.measure_student("before stage 2").look)
        self.pace.begin_stage()
        with closing(trainer.prompts), self.interrupts, self.pace.clock:
            try:
                while trainer.step < stage.steps and not self.interrupts.arrived():
                    started = time.perf_counter()
                    self._in_update = True
                    with not_exiting("a plugin"):  # such as a matching; objectives and rewards are named
                        line = trainer.train_step(noted=self._noted(trainer.step + 1, self.progress.total + 1))
                    self._in_update = False
                    self.progress = self._progress(stage, trainer, trainer.prompts.consumed)
                    self._note(trainer, line, time.perf_counter() - started, bar)
                    if self._due(config.sample_steps):
                        spent = self.pace.evaluation
                        with self._averaged(trainer):
                            self._draw_grid()
                        self._weigh("sample_steps", self.pace.evaluation - spent)
                    if self._due(config.save_steps) and trainer.step < stage.steps:
                        self.keeper.save(trainer, self.progress)
            except Exception as error:
                self.keeper.save_before_leaving(trainer, replace(self.progress, torn=self._in_update), error)
                raise
            self.keeper.save(trainer, self.progress, stage_end=trainer.step == stage.steps)
            stopped = self.interrupts.arrived()
        if stopped:
            bar.close()
            self.accelerator.wait_for_everyone()  # a launcher ends all with the code of the first that leaves
            self.accelerator.end_training()
            if self.accelerator.is_main_process:
                logger.warning("stopped at step %d; go on with %s", self.progress.total, self.keeper.how_to_go_on())
            self.interrupts.leave()
        if trainer.student.ema:
            trainer.student.ema.settle()
        self._draw_grid()
        if self.observer.measures:
            with self.pace.evaluating():
                look = self.observer.evaluate_student(f"stage {stage.number}")
            if stage.number == 1 and self._guards:
                self.watch.remember(look)
            else:
                self.watch(look, self.progress.total)

    def _progress(self, stage: Stage, trainer: Trainer, consumed: int) -> Progress:
        return Progress(
            stage.number, trainer.step, stage.first_step + trainer.step, consumed, batch=self.plan.batch.whole
        )

    def _noted(self, step: int, total: int) -> bool:
        """Whether an update, so many into the stage and into the run, gets a line in the log."""
        return step == 1 or step % self.config.logging_steps == 0 or self._evaluated(total)

    @property
    def _guards(self) -> bool:
        """Whether the run can hack a reward, and is evaluated."""
        rl = any(stage.objectives for stage in self.plan.stages)
        return rl and self.job.rewards is not None and self.observer.measures

    def _evaluated(self, total: int) -> bool:
        """Whether the student is evaluated after so many updates of the run."""
        return self.config.eval_steps > 0 and total % self.config.eval_steps == 0 and self.observer.measures

    def _note(self, trainer: Trainer, line: Mapping[str, float], seconds: float, bar: "tqdm[Any]") -> None:
        noted = self._noted(trainer.step, self.progress.total)
        values, failure, spent = dict(line), None, self.pace.evaluation
        try:
            if noted and (trainer.sample_weight or trainer.objectives.terms):
                values |= trainer.reward_metrics()
            if self._evaluated(self.progress.total):
                with self.pace.evaluating(), self._averaged(trainer):
                    found = self.observer.measure_student(f"step {self.progress.total}")
                values |= {logged(name): value for name, value in found.metrics.items()}
                values |= self.watch(found.look, self.progress.total)
        except Exception as error:  # of a reward: the update will be saved, and its line is not made again
            failure = error
        self.pace.add(values, seconds, self.plan.rollouts * trainer.prompts.batch_size)
        if self.pace.evaluation > spent:
            self._weigh("eval_steps", self.pace.evaluation - spent)
        self._show(values, bar)
        if noted or trainer.bad_steps:
            self.log.write(self.progress, values | self.pace.line(self.plan.updates - self.progress.total))
        if failure:
            raise failure

    def _show(self, values: Mapping[str, float], bar: "tqdm[Any]") -> None:
        """The update's own values in the progress bar; they have been read already, so that nothing waits for them."""
        short = {"stage": str(self.progress.stage)} | {
            key.removeprefix("loss/").removesuffix("/total"): f"{value:.3f}"
            for key, value in values.items()
            if key.startswith("loss/") or key == "reward/total"
        }
        left = self.pace.seconds_left(self.plan.updates - self.progress.total)
        bar.set_postfix(short | {"left": tqdm.format_interval(left)}, refresh=False)
        bar.update()

    @staticmethod
    def _averaged(trainer: Trainer) -> AbstractContextManager[None]:
        """The student as users get it."""
        return trainer.student.ema.applied() if trainer.student.ema else nullcontext()

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.total > 0 and self.progress.total % every == 0

    def _weigh(self, flag: str, seconds: float) -> None:
        """Say it once where what is done every so many updates takes much of the training's time."""
        often = self.pace.too_often(seconds, flag, getattr(self.config, flag))
        if often and flag not in self._said and self.accelerator.is_main_process:
            self._said.add(flag)
            logger.warning("%s %s", OFTEN[flag], often)

    def _draw_grid(self) -> None:
        with self.pace.evaluating():
            grids = self.observer.draw_grid(self.progress.total)
        self.log.show({f"samples/{name}": grid for name, grid in grids.items()}, self.progress.total)

    def _finish(self) -> None:
        """Teacher's share of the evaluation, export, report and upload."""
        if self.observer.measures:
            with self.pace.evaluating():
                self.observer.evaluate_teacher()
        if isinstance(self.job.backend, Shardable) and self.plan.shards > 1:
            self.job.backend.gather()
        if self.accelerator.is_main_process:
            check_there(self.output)
            objectives = "" if not self.job.objectives else self.config.rl
            export(
                self.output / "student",
                self.job.backend,
                self.job.user_sampler,
                base=self.job.folder,
                family=self.config.backend,
                name=self.job.teacher,
                prompt=self.observer.rows[0]["prompt"],
                mixed_precision=self.precision,
                objectives=objectives,
                rewards=self.config.reward if self.job.rewards else "",
                start=self.config.model if self.job.teacher != self.config.model else "",
            )
            write_report(self.output)
            logger.info("image grids and evaluations: %s", self.pace.evaluated())
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.upload and self.accelerator.is_main_process:  # the others need not wait for it
            logger.info("uploaded to %s", self.upload(self.output / "student"))
