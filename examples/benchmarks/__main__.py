"""How fast and how small a training step is, beside a plain loop in the same run.

    make speed                                                   # all cases, one table
    python -m examples.benchmarks --cases digits --repeats 9     # one of them, more steps
    python -m examples.benchmarks --against before.json          # and what has changed since

Run it in the root of the repository, on a machine that does nothing else. Both loops live at the same time and take
their steps in turns, so that what slows the machine slows both; a figure is the median of the steps. Memory is that of
all tensors that are alive at a step's peak.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dmdr.cache import cache_folder
from dmdr.cli.common import CommandParser, command
from dmdr.errors import ConfigError, TrainingError
from dmdr.training.phases import OTHER, PHASES

from .cases import CASES

CPU = Path("/proc/cpuinfo")
LOOPS = ("dmdr", "plain")
PLAIN = ("none", "refl")  # the objectives that the plain loop has
PARTS = (*PHASES, OTHER)
HEAD = """\
| case | objective | loop | seconds a step | images a second | peak MiB | GFLOP | of matmul rate | Python | phases |
|---|---|---|---|---|---|---|---|---|---|"""
TOLERANCE = 1e-3  # of the losses of a first step, relative
Figures = dict[str, Any]


class Loop:
    """A worker process."""

    def __init__(self, case: str, objective: str, loop: str, folder: Path) -> None:
        call = [sys.executable, "-m", f"{__package__}.worker", case, objective, loop, str(folder)]
        self.name, self.told = f"{case} {objective}, {loop}", subprocess.PIPE
        self.process = subprocess.Popen(call, stdin=self.told, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)

    def ask(self, what: str) -> Figures:
        """A step, and its figures.

        Raises:
            TrainingError: If the process has failed.
        """
        assert self.process.stdin and self.process.stdout
        try:
            print(what, file=self.process.stdin, flush=True)
            answer: Figures = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.name}: the worker failed, see above") from error
        return answer

    def close(self) -> None:
        """End it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(name: str, objective: str, repeats: int, folder: Path) -> dict[str, Figures]:
    """Figures of the loops that know the objective, by loop.

    Raises:
        TrainingError: If the losses of their first steps differ.
    """
    names = LOOPS if objective in PLAIN else LOOPS[:1]
    loops = {}
    try:
        for loop in names:  # one after the other, as both may build the model
            loops[loop] = Loop(name, objective, loop, folder)
            first = loops[loop].ask("step")["losses"]
            if loop == "dmdr":
                expected = first
        check(f"{name} {objective}", expected, first)
        steps: dict[str, list[Figures]] = {loop: [] for loop in names}
        for _ in range(repeats):
            for loop in names:
                steps[loop].append(loops[loop].ask("step"))
        found = {loop: summary(steps[loop]) for loop in names}
        for loop in names:
            for what in ("count", "memory", "profile"):
                found[loop] |= loops[loop].ask(what)
        return found
    finally:
        for each in loops.values():
            each.close()


def check(who: str, ours: Mapping[str, float], plain: Mapping[str, float]) -> None:
    """Refuse to compare loops that compute different things.

    Raises:
        TrainingError: If a loss differs.
    """
    for loss, value in plain.items():
        if abs(ours[loss] - value) > TOLERANCE * abs(value):
            raise TrainingError(f"{who}: the first steps differ: loss {loss} is {ours[loss]:g} and {value:g}")


def summary(steps: list[Figures]) -> Figures:
    """Medians of a loop's steps."""
    seconds = [step["seconds"] for step in steps]
    return {
        "seconds": median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        **{name: steps[0][name] for name in ("batch", "device", "dtype")},
        "phases": {phase: median(step["phases"][phase] for step in steps) for phase in PARTS},
    }


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 2.0) -> float:
    """Floating-point operations a second in products of large square matrices, the best of many."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        c = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    del c
    return best


def shown(name: str, objective: str, found: Mapping[str, Figures], rate: float) -> list[str]:
    """Rows of the table: each loop, and what ours takes of the other."""
    rows = []
    for loop, values in found.items():
        seconds, parts = values["seconds"], values["phases"]
        shares = ", ".join(f"{phase} {parts[phase] / seconds:.0%}" for phase in PARTS if parts[phase] > 0.005 * seconds)
        rows.append(
            f"| {name} | {objective} | {loop} | {seconds:.3g} ({values['least']:.3g}-{values['most']:.3g}) "
            f"| {values['batch'] / seconds:.3g} | {values['peak'] / 2**20:.0f} | {values['flops'] / 1e9:.4g} "
            f"| {values['flops'] / seconds / rate:.0%} | {values['python']:.0%} | {shares} |"
        )
    if len(found) > 1:
        ours, plain = found["dmdr"], found["plain"]
        ratios = {key: ours[key] / plain[key] for key in ("seconds", "peak", "flops")}
        rows.append(
            f"| {name} | {objective} | dmdr / plain | {ratios['seconds']:.2f} | {1 / ratios['seconds']:.2f} "
            f"| {ratios['peak']:.2f} | {ratios['flops']:.2f} | | | |"
        )
    return rows


def compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed of the rows that both have: DMDR's, and DMDR's beside the plain loop of the same run."""
    rows = [
        "| case | objective | seconds, times before | beside the plain loop | memory, times before |",
        "|---" * 5 + "|",
    ]
    for key, found in now["figures"].items():
        old = before["figures"].get(key)
        if old is None:
            continue
        seconds, peak = (found["dmdr"][name] / old["dmdr"][name] for name in ("seconds", "peak"))
        beside = ""
        if "plain" in found and "plain" in old:
            beside = f"{seconds / (found['plain']['seconds'] / old['plain']['seconds']):.2f}"
        rows.append(f"| {key.replace(' ', ' | ')} | {seconds:.2f} | {beside} | {peak:.2f} |")
    return rows


def machine() -> str:
    """In words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = [line.partition(": ")[2] for line in CPU.read_text().splitlines() if line.startswith("model name")]
    return f"{found[0] if found else platform.processor()}, {torch.get_num_threads()} threads"


def bench(arguments: list[str]) -> None:
    args = flags(arguments)
    before = json.loads(args.against.read_text()) if args.against else None
    chosen = [(name, objective) for name in args.cases for objective in CASES[name].objectives]
    chosen = [each for each in chosen if not args.objectives or each[1] in args.objectives]
    if not chosen:
        raise ConfigError(f"--objectives: these cases have no {', '.join(args.objectives)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "repeats": args.repeats, "figures": {}}
    print(f"{result['machine']}, torch {result['torch']}, medians of {args.repeats} steps")
    print("\n".join(f"{name}: {CASES[name].about}" for name in args.cases), f"\n\n{HEAD}", sep="", flush=True)
    rates: dict[str, float] = {}
    for name, objective in chosen:
        found = measure(name, objective, args.repeats, cache_folder() / "benchmarks" / name)
        dtype = found["dmdr"]["dtype"]
        if dtype not in rates:
            rates[dtype] = matmul_rate(getattr(torch, dtype), device)
        result["figures"][f"{name} {objective}"] = found
        print("\n".join(shown(name, objective, found, rates[dtype])), flush=True)
    result["matmul"] = rates
    print("\n" + "\n".join(f"products of matrices, {dtype}: {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()))
    if before:
        print(f"\nSince {args.against} ({before['machine']}):\n\n" + "\n".join(compared(before, result)))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def flags(arguments: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog=f"python -m {__package__}", description=__doc__, formatter_class=layout)
    here = [name for name, case in CASES.items() if case.gpu == torch.cuda.is_available()]
    what = "by default all of this device: those of published shapes on a GPU, the small ones on a CPU"
    parser.add_argument("--cases", nargs="+", choices=CASES, default=here, help=what)
    parser.add_argument("--objectives", nargs="+", default=[], help="by default all of a case")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each loop that are measured")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--against", type=Path, help="such a file of an earlier run, to compare with")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, not {args.repeats}")
    large = [name for name in args.cases if CASES[name].gpu]
    if large and not torch.cuda.is_available():
        raise ConfigError(f"--cases {' '.join(large)}: models of published shapes need a GPU")
    if args.against and not args.against.is_file():
        raise ConfigError(f"--against {args.against} is no file")
    return args


def main() -> int:
    sys.argv[0] = "benchmarks"  # as which it speaks
    return command(bench)


if __name__ == "__main__":
    sys.exit(main())
