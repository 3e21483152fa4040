"""Fixtures of the families' tests."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import sd3
from family import Stock

STOCK = """
import json, re, sys, torch
torch.set_num_threads(1)
sys.modules["dmdr"] = None  # importing it is an error from here on
for line in sys.stdin:
    student, prompts, output = json.loads(line)
    code = re.search("```python\\n(.*?)```", open(student + "/README.md").read(), re.S)[1]
    code = code.replace("path/to/this/folder", student).replace(".images[0]", ".images")
    code = re.sub(r"pipe\\('[^']*'", f"pipe({prompts!r}", code)
    code = code.replace('image.save("image.png")', 'for i, one in enumerate(image): one.save(f"{output}/{i:04d}.png")')
    exec(code, {"output": output})
    print("drawn", flush=True)
"""


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Runs the snippet of an export's card for some prompts, in a process that cannot import dmdr."""
    place = tmp_path_factory.mktemp("stock")
    with (
        (place / "errors").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", STOCK],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=place,
        ) as process,
    ):  # fmt: skip

        def draw(student: Path, prompts: Sequence[str], output: Path) -> None:
            assert process.stdin and process.stdout
            output.mkdir()
            print(json.dumps([str(student), list(prompts), str(output)]), file=process.stdin, flush=True)
            assert process.stdout.readline() == "drawn\n", (place / "errors").read_text()

        yield draw
        process.communicate()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 3 with random weights, which no test changes."""
    folder = tmp_path_factory.mktemp("pipelines") / "sd3"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(no_report: None) -> None:
    """None of these tests is about the report."""
