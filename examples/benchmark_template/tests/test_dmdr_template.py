"""DMDR's own checks of what a benchmark promises, and one of what this one is for."""

import torch

from dmdr.benchmarks import KeptAnswers
from dmdr.testing import check_benchmark
from dmdr_template import Brightness


def test_benchmark_keeps_its_promises() -> None:
    check_benchmark(Brightness(dark=0.3))


def test_figures_are_means_over_prompts() -> None:
    images = torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    rows = [{"prompt": "one"}, {"prompt": "one"}, {"prompt": "two"}]  # of the first prompt there are two images
    benchmark = Brightness()
    figures = benchmark.figures(KeptAnswers(benchmark.answers(images, rows)), rows, None)
    assert abs(figures["mean"].value - 0.7) < 1e-6
    assert figures["share of dark"].value == 0.25
