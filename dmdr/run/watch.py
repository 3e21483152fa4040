"""The guard at work in a run: it keeps the evaluation at the end of stage 1, and says when a reward looks hacked."""

import json
import logging
from contextlib import suppress
from itertools import takewhile
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
        found: Of each later one, in order: updates of the run (`step`), and what speaks for a hacked reward (`text`);
            "" if nothing does.
    """

    def __init__(self, config: Config, accelerator: Any, output: Path) -> None:
        self.config, self.accelerator, self.output = config, accelerator, output
        self.before: Look | None = None
        self.found: list[dict[str, Any]] = []

    def resume(self, prompts: list[str], step: int) -> None:
        """Go on after `step` updates, with what the run's folder holds of the time before."""

        def read() -> tuple[Look | None, list[dict[str, Any]]]:
            found = [each for each in self._findings() if each["step"] <= step]
            self._write(found)
            return self._read(prompts), found

        self.before, self.found = on_main_process(self.accelerator, read)

    def remember(self, look: Look | None) -> None:
        """What later evaluations are compared with; None of a run without rewards."""
        self.before = look
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
        earlier = list(takewhile(lambda each: each["text"], reversed(self.found)))
        text = self._said(causes, min([step, *(each["step"] for each in earlier)])) if causes else ""
        self.found.append({"step": step, "text": text})
        on_main_process(self.accelerator, lambda: self._write(self.found))
        if text and self.config.on_hacking == "stop":
            raise TrainingError(f"--on_hacking stop: {text}")
        if text and not earlier and self.accelerator.is_main_process:
            logger.warning("%s", text)
        return {f"guard/{name}": value for name, value in metrics.items()}

    def _said(self, causes: list[str], since: int) -> str:
        """In words.

        Args:
            causes: That the reward has risen, then what has fallen.
            since: Updates at the first evaluation that spoke for it, with none in between that did not.
        """
        saved = [path for path in checkpoints(self.output) if number_of(path) < since]
        good = saved[-1] if saved else self.config.init_student
        where = f"the last student before is {good}" if good else "no checkpoint from before was kept (--save_steps)"
        rose, *fell = causes
        return f"the reward looks hacked since update {since}: {rose}, but {' and '.join(fell)}; {where}"

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
            return [{"step": int(each["step"]), "text": str(each["text"])} for each in found]
        return []

    def _write(self, found: list[dict[str, Any]]) -> None:
        images.write_atomically(self.output / FINDINGS, (json.dumps(found, indent=2) + "\n").encode())
