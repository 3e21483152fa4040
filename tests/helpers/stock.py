"""Exports drawn by stock diffusers, as their cards say, in a process that cannot import dmdr."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from family import Stock

CODE = """
import json, re, sys, torch
torch.set_num_threads(1)
sys.modules["dmdr"] = None  # importing it is an error from here on
for line in sys.stdin:
    student, prompts, output, device = json.loads(line)
    code = re.search("```python\\n(.*?)```", open(student + "/README.md").read(), re.S)[1]
    code = code.replace("path/to/this/folder", student).replace(".images[0]", ".images")
    code = code.replace("torch.manual_seed", f"pipe.to({device!r})\\ntorch.manual_seed")
    code = re.sub(r"pipe\\((prompt=)?'[^']*'", rf"pipe(\\1{prompts!r}", code)
    code = code.replace('image.save("image.png")', 'for i, one in enumerate(image): one.save(f"{output}/{i:04d}.png")')
    exec(code, {"output": output})
    print("drawn", flush=True)
"""


@contextmanager
def stock_diffusers(place: Path, device: str) -> Iterator[Stock]:
    """Runs the snippet of an export's card for some prompts on a device.

    Args:
        place: A folder for what the process complains of.
    """
    with (
        (place / "errors").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=place,
        ) as process,
    ):  # fmt: skip

        def draw(student: Path, prompts: Sequence[str], output: Path) -> None:
            assert process.stdin and process.stdout
            output.mkdir()
            print(json.dumps([str(student), list(prompts), str(output), device]), file=process.stdin, flush=True)
            assert process.stdout.readline() == "drawn\n", (place / "errors").read_text()

        yield draw
        process.communicate()
