"""The run of one fault: started as users start it, and held against the guides and a run that nobody disturbed."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runs import command, damaged, going_on, outcome

from dmdr.backends.toy import PROMPTS

LIMIT = 180.0  # seconds; what takes longer hangs
BEGINS = "; loading torch and the plugins"  # the end of a run's first line, which is no error
OWN = str(Path(__file__).with_name("broken.py"))
LOCAL = {
    "model": "toy", "backend": f"{OWN}:Backend", "matching": f"{OWN}:Matching", "reward": f"{OWN}:Reward as judge",
    "save_total_limit": 1,
}  # fmt: skip
Process = subprocess.Popen[str]


class Room:
    """A folder for the run of one fault.

    Attributes:
        parts: Settings that the run shares with the undisturbed one.
        wrong: What was not as it should be.
        ends: Of each start of the run, the exit code and the seconds.
        said: The line that says what went wrong.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.folder = root, root / re.sub(r"\W+", "-", name) / "run"
        self.parts: dict[str, Any] = LOCAL
        self.wrong: list[str] = []
        self.ends: list[str] = []
        self.said = ""
        self.folder.parent.mkdir(parents=True)
        self.prompts = self.folder.parent / "prompts.txt"
        self.prompts.write_text("\n".join(PROMPTS) + "\n")

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    def train(
        self,
        code: int,
        says: str = "",
        *,
        fault: str = "",
        words: str = "",
        launcher: tuple[str, ...] = (),
        environment: Mapping[str, str] = {},
        meanwhile: Callable[[Process], object] = lambda process: None,
        before: Callable[[], None] | None = None,
        **settings: Any,
    ) -> None:
        """Start the run, wait for its end, and see how it ended.

        Args:
            code: The exit code that it should have.
            says: Pattern of a line that should be on stderr.
            fault: What breaks, as `broken.py` reads it.
            words: The command that it runs then.
            meanwhile: What is done while it runs.
            before: What is done in its process before it starts.
        """
        arguments = command(self.folder, *launcher, **self.parts | {"prompts": self.prompts} | settings)
        own = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "FAULT_COMMAND": words}
        own |= {"FAULT": fault} if fault else {}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = time.monotonic()
        process = subprocess.Popen(
            arguments, env={**os.environ, **own, **environment}, start_new_session=True, preexec_fn=before, **pipes
        )
        try:
            meanwhile(process)
            _, said = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, said = process.communicate()
            self.wrong.append("it hangs")
        self.ends.append(f"{process.returncode} in {time.monotonic() - started:.0f} s")
        (self.folder.parent / f"stderr-{len(self.ends)}.txt").write_text(said)
        lines = [line.strip() for line in re.split("[\r\n]", said)]
        why = [line for line in lines if line.startswith("dmdr-train: ") and not line.endswith(BEGINS)]
        found = [line for line in lines if re.search(says, line)]
        self.said = found[-1] if says and found else self.said
        self.expect(process.returncode == code, f"it ends with {process.returncode}, not with {code}")
        self.expect(bool(found), f"it does not say '{says}', but '{''.join(why)}'")
        self.expect(len(why) == (code in (1, 2)), f"{len(why)} lines say why it ends")
        self.expect("Traceback" not in said, "it leaves a traceback")
        self.wrong += damaged(self.folder)

    def go_on(self, code: int = 0, says: str = "", **settings: Any) -> None:
        """Resume the run, or begin it again where nothing was saved."""
        again = going_on(self.folder)
        trusted = {"config": self.folder / "config.yaml"} if "resume_from_checkpoint" in again else {}
        self.train(code, says, **trusted | again | settings)

    def end_as_undisturbed(self, lacking: int = 0, **settings: Any) -> None:
        """Go on, now without the fault, to the end of a run of these parts in which nothing broke.

        Args:
            lacking: An update whose line in the log may lack its rewards.
        """
        streamed = "-streamed" * ("dataset_streaming" in self.parts)
        whole = self.root / f"whole-{self.parts.get('rl', 'refl')}{streamed}"
        if not whole.exists():
            room = Room(self.root, f"undisturbed {whole.name}")
            room.parts = self.parts
            room.train(0)
            assert not room.wrong, room.wrong
            room.folder.rename(whole)
        self.go_on(**settings)
        if self.wrong:
            return
        found, wanted = outcome(self.folder), outcome(whole)
        for line, other in zip(found["log"], wanted["log"], strict=False):
            if line["step"] == lacking:
                line |= other | line
        for name in ("log", "evaluation"):
            self.expect(found[name] == wanted[name], f"another {name}")
        self.expect(wanted["weights"].items() <= found["weights"].items(), "other weights")  # there may be more saves
