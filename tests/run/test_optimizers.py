"""--optim: each optimizer trains both networks, goes on to the same bits, and is refused what it does not read."""

import copy
import dataclasses
import signal
import sys
import typing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dmdr import train
from dmdr.errors import ConfigError
from dmdr.protocols import Role
from dmdr.run.run import Trainer
from dmdr.settings.fields import Config
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.settings.parse import parse
from toy_trainer import prepared

pytestmark = pytest.mark.usefixtures("no_report")
RUN: dict[str, Any] = {
    "model": "toy", "rl": "refl", "stage1_steps": 3, "stage2_steps": 2, "per_device_train_batch_size": 8,
    "fake_updates": 2, "sample_steps": 0, "sample_images": 1, "teacher_steps": 1, "warmup_steps": 2,
    "lr_scheduler_type": "cosine", "report_to": "none",
}  # fmt: skip
ROLES: tuple[Role, ...] = ("student", "fake_score")
EACH = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            bool(each.package) and find_spec(each.package) is None, reason=f"{each.package} is not installed"
        ),
    )
    for name, each in OPTIMIZERS.items()
]


def settings_of(optim: str) -> dict[str, Any]:
    rate = 1.0 if OPTIMIZERS[optim].finds_rate else 1e-3
    return RUN | {"optim": optim} | dict.fromkeys(("learning_rate", "stage2_learning_rate", "fake_learning_rate"), rate)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / "step-000005"
    return {
        f"{role}.{name}": tensor for role in ROLES for name, tensor in load_file(last / f"{role}.safetensors").items()
    }


def interrupt(patch: pytest.MonkeyPatch, total: int) -> None:
    """Ctrl-C during the `total`-th student update of the run."""
    step = Trainer.train_step

    def stepped(self: Trainer, **how: Any) -> dict[str, float]:
        if self.first_step + self.step + 1 == total:
            signal.raise_signal(signal.SIGINT)
        return step(self, **how)

    patch.setattr(Trainer, "train_step", stepped)


def test_the_flag_takes_those_of_the_table() -> None:
    assert typing.get_args(typing.get_type_hints(Config)["optim"]) == tuple(OPTIMIZERS)
    settings = {f.name for f in dataclasses.fields(Config)}
    assert all(set(each.unread) <= settings for each in OPTIMIZERS.values())
    assert all(each.smaller in {"", *OPTIMIZERS} for each in OPTIMIZERS.values())


@pytest.mark.parametrize("optim", EACH)
def test_it_trains_both_networks_and_goes_on_to_the_same_bits(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(optim)
    whole = weights(train(**settings, output_dir=str(tmp_path / "whole")))
    backend = prepared(roles=ROLES)
    start = {f"{role}.{name}": p for role in ROLES for name, p in backend.parameters(role).items()}
    assert all(tensor.isfinite().all() and not torch.equal(tensor, start[name]) for name, tensor in whole.items())
    run = str(tmp_path / "run")
    for total in (2, 4):
        with monkeypatch.context() as patch:
            interrupt(patch, total)
            with pytest.raises(KeyboardInterrupt):
                train(**settings, output_dir=run, resume_from_checkpoint=None if total == 2 else "latest")
    found = weights(train(**settings, output_dir=run, resume_from_checkpoint="latest"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


@pytest.mark.parametrize("optim", EACH)
def test_it_reads_each_setting_that_is_not_refused(optim: str) -> None:
    """Of two steps with another value, the result is another."""
    torch.manual_seed(0)
    first, grads = torch.randn(64, 80), torch.randn(2, 64, 80)

    def moved(**settings: Any) -> torch.Tensor:
        config = copy.copy(parse(settings={"model": "toy", "optim": optim, "reward": "none"}).config)
        vars(config).update(settings)
        parameter, options = torch.nn.Parameter(first.clone()), OPTIMIZERS[optim].options(config, rate=0.1, decay=0.1)
        optimizer = OPTIMIZERS[optim].build([parameter], **options)
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()
        return parameter.detach()

    usual = moved()
    for name, value in {"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1.0}.items():
        assert torch.equal(moved(**{name: value}), usual) == (name in OPTIMIZERS[optim].unread), name


@pytest.mark.parametrize("optim", [name for name, each in OPTIMIZERS.items() if each.unread])
def test_what_it_does_not_read_is_refused(optim: str) -> None:
    for name in OPTIMIZERS[optim].unread:
        with pytest.raises(ConfigError, match=f"^--{name} is not read by --optim {optim}; leave it out$"):
            parse(settings={"model": "toy", "optim": optim, name: 0.5})


@pytest.mark.parametrize("optim", [name for name, each in OPTIMIZERS.items() if each.package])
def test_a_missing_package_is_named(optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = OPTIMIZERS[optim].package
    for name in [name for name in sys.modules if name.split(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"^--optim needs {package}: pip install {package}$"):
        train(**settings_of(optim), output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    folder = train(**settings_of("adafactor"), output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"step-000005 holds the state of --optim adafactor; go on with it, or begin"):
        train(output_dir=str(folder), resume_from_checkpoint="latest", optim="adamw_torch", stage2_steps=3)


def test_a_rate_that_is_none_for_prodigy(caplog: pytest.LogCaptureFixture) -> None:
    rates = {"learning_rate": 1.0, "stage2_learning_rate": 1.0, "fake_learning_rate": 1e-4}
    parse(settings={"model": "toy", "optim": "prodigy"} | rates)
    (said,) = caplog.messages
    assert (
        said
        == "--optim prodigy finds the learning rate and multiplies it by --fake_learning_rate: 1 is usual, not 0.0001"
    )
