"""The guard at work in a run: it keeps the evaluation at the end of stage 1, and says when a reward looks hacked."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save

from dmdr import images
from dmdr.errors import ConfigError, TrainingError, one_line
from dmdr.evaluation.guard import Look, compare, look_of
from dmdr.run.checkpoint import checkpoints, number_of
from dmdr.run.device import on_main_process
from dmdr.settings.fields import Config
from dmdr.states import read_tensors

logger = logging.getLogger("dmdr")
REFERENCE = "guard.safetensors"
FINDINGS = "hacking.json"


class Watch:
    """Compares each evaluation of stage 2 with that at the end of stage 1.

    All processes must call each method together.

    Attributes:
        before: The evaluation at the end of stage 1, once it is known.
    """

    def __init__(self, config: Config, accelerator: Any, output: Path) -> None:
        self.config, self.accelerator, self.output = config, accelerator, output
        self.before: Look | None = None
        self._since: int | None = None  # updates, where the last evaluation spoke for a hacked reward
        self._clean = 0  # updates, at the last evaluation that did not

    def resume(self, prompts: list[str], step: int) -> None:
        """Go on after `step` updates, with what the run's folder holds of the time before."""

        def read() -> tuple[Look | None, list[dict[str, Any]]]:
            found = self._findings()
            kept = [each for each in found if each["step"] <= step]
            if len(kept) < len(found):
                self._write(kept)
            return self._read(prompts), kept

        self.before, found = on_main_process(self.accelerator, read)
        self._since, self._clean = (found[-1]["since"], found[-1]["clean"]) if found else (None, step)

    def _read(self, prompts: list[str]) -> Look | None:
        file = self.output / REFERENCE
        if not file.is_file():
            return None
        try:
            found = look_of(read_tensors(file), prompts)
        except (ConfigError, KeyError) as error:
            logger.warning("hacked rewards are not looked for: %s is damaged: %s", file, one_line(error))
            return None
        if len(found.trained) != len(prompts):
            logger.warning("hacked rewards are not looked for: %s is of other prompts than --num_eval_samples", file)
            return None
        return found

    def _findings(self) -> list[dict[str, Any]]:
        """What was found so far; nothing of a damaged file."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads((self.output / FINDINGS).read_text())
            return [{name: each[name] for name in ("step", "since", "clean", "text")} for each in found]
        return []

    def remember(self, look: Look | None, step: int) -> None:
        """What later evaluations are compared with; None of a run without rewards."""
        self.before, self._clean = look, step
        if look is not None:
            content = save(look.tensors())
            on_main_process(self.accelerator, lambda: images.write_atomically(self.output / REFERENCE, content))

    def __call__(self, look: Look | None, step: int) -> dict[str, float]:
        """Look at an evaluation after `step` updates of the run.

        Returns: What has become of stage 1's images, for the log; nothing where there is nothing to compare with.

        Raises:
            TrainingError: With --on_hacking stop, where it speaks for a hacked reward.
        """
        before = self.before
        if before is None or look is None:
            return {}
        metrics, causes = on_main_process(self.accelerator, lambda: compare(before, look))
        if causes:
            began, self._since = self._since is None, self._since or step
            text = self._said(causes)
            on_main_process(self.accelerator, lambda: self._add(step, text))
            if self.config.on_hacking == "stop":
                raise TrainingError(f"--on_hacking stop: {text}")
            if began and self.accelerator.is_main_process:
                logger.warning("%s", text)
        else:
            self._since, self._clean = None, step
        return {f"guard/{name}": value for name, value in metrics.items()}

    def _said(self, causes: list[str]) -> str:
        earlier = [path for path in checkpoints(self.output) if number_of(path) <= self._clean]
        good = earlier[-1] if earlier else self.config.init_student
        where = f"the last student before is {good}" if good else "no checkpoint from before was kept (--save_steps)"
        rose, *fell = causes
        return f"the reward looks hacked since update {self._since}: {rose}, but {' and '.join(fell)}; {where}"

    def _add(self, step: int, text: str) -> None:
        self._write([*self._findings(), {"step": step, "since": self._since, "clean": self._clean, "text": text}])

    def _write(self, findings: list[dict[str, Any]]) -> None:
        images.write_atomically(self.output / FINDINGS, (json.dumps(findings, indent=2) + "\n").encode())
