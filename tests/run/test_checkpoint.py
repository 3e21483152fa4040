"""Checkpoints as folders: complete or absent, kept or pruned, and refused where they do not fit."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.run import checkpoint
from dmdr.run.checkpoint import (
    Progress,
    check_whole,
    checkpoints,
    damage,
    find_initial,
    load_parameters,
    newest_whole,
    prune,
    read_progress,
    restore,
    save_checkpoint,
)
from dmdr.states import is_shared, whole

PROGRESS = {"stage": 1, "step": 1, "total": 1, "prompts_consumed": 3, "batch": 8}


class Roles:
    """What a run saves: two trained roles and no reference."""

    def __init__(self, seed: int = 0, width: int = 3) -> None:
        torch.manual_seed(seed)
        self.networks = {role: nn.Linear(width, 2) for role in ("student", "fake_score")}
        self.optimizers = {
            role: torch.optim.AdamW(network.parameters(), lr=0.1) for role, network in self.networks.items()
        }

    @property
    def tensors(self) -> dict[str, dict[str, nn.Parameter]]:
        return {role: dict(network.named_parameters()) for role, network in self.networks.items()}

    def train(self) -> None:
        for role, network in self.networks.items():
            network(torch.ones(1, network.in_features)).square().sum().backward()
            self.optimizers[role].step()
            self.optimizers[role].zero_grad()

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for network in self.networks.values() for p in network.parameters()]


def save(folder: Path, total: int, *, stage: int = 1, roles: Any = None, stage_end: bool = False) -> Path:
    roles = roles or Roles()
    extra = {"objectives": {"mine": {"mean": torch.tensor(2.0)}}}
    place = Progress(stage, total, total, 3 * total)
    return save_checkpoint(folder / "checkpoints", place, roles.tensors, roles.optimizers, extra, stage_end=stage_end)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    roles = Roles()
    roles.train()
    folder = save(tmp_path, 12, roles=roles)
    assert folder == tmp_path / "checkpoints" / "step-000012"
    assert read_progress(folder) == Progress(stage=1, step=12, total=12, prompts_consumed=36)
    other = Roles(seed=1)
    extra = restore(folder, other.tensors, other.optimizers)
    assert extra == {"objectives": {"mine": {"mean": torch.tensor(2.0)}}}
    assert all(map(torch.equal, roles.state(), other.state()))
    roles.train()
    other.train()  # the moments came along
    assert all(map(torch.equal, roles.state(), other.state()))


def test_settings_of_the_optimizer_are_those_of_the_new_run(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    other = Roles()
    other.optimizers["student"].param_groups[0]["lr"] = 0.7
    restore(folder, {}, other.optimizers)
    assert other.optimizers["student"].param_groups[0]["lr"] == 0.7


def test_a_role_that_the_run_lacks_is_not_saved(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert {path.name for path in folder.iterdir()} == {
        "student.safetensors",
        "fake_score.safetensors",
        "training.pt",
        "progress.json",
        "manifest.json",
    }


def test_who_may_read_a_checkpoint_is_for_the_umask_to_say(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, 1)
    content = {path.name: path.read_bytes() for path in before.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"step-000002 could not be written: No space left on device; earlier"):
        save(tmp_path, 2, roles=Roles(seed=1))
    assert names(tmp_path) == ["step-000001"]
    assert {path.name: path.read_bytes() for path in before.iterdir()} == content
    monkeypatch.undo()
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    """A run that goes on would learn of it only when it is resumed."""
    roles = Roles()
    extra = {"objectives": {"mine": {"seen": (1, "a", None), "mean": np.float64(2.0)}}}
    said = "a checkpoint can hold tensors, numbers, text, lists and dicts, but not a numpy.float64"
    with pytest.raises(TrainingError, match=re.escape(f"state_dict() of objectives, mine, mean: {said}")):
        save_checkpoint(tmp_path, Progress(1, 1, 1, 3), roles.tensors, roles.optimizers, extra)
    assert not list(tmp_path.iterdir())


def test_a_step_is_saved_again_only_if_it_is_damaged(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert save(tmp_path, 5, roles=Roles(seed=1), stage_end=True) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "stage_end"} == written
    assert (folder / "stage_end").exists()
    flip(folder / "student.safetensors", -1)
    save(tmp_path, 5, stage=2)
    assert damage(folder) is None and read_progress(folder).stage == 2
    assert not list((tmp_path / "checkpoints").glob(".*"))


def flip(file: Path, where: int) -> None:
    """One bit, in place."""
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["student.safetensors", "fake_score.safetensors", "training.pt", "progress.json"])
@pytest.mark.parametrize("harm", ["first", "middle", "last", "zeros", "cut", "empty", "gone"])
def test_every_kind_of_damage_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    file, whole = bad / name, (bad / name).read_bytes()
    places = {"first": 0, "middle": len(whole) // 2, "last": len(whole) - 1}
    if harm in places:
        flip(file, places[harm])
    elif harm == "zeros":
        file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    elif harm == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2 if harm == "cut" else 0])
    assert newest_whole(checkpoints(tmp_path)) == good
    (said,) = caplog.messages
    assert "step-000002" in said and name in said and "DMDR looks for an earlier checkpoint" in said
    with pytest.raises(ConfigError, match=f"step-000002.*use {re.escape(str(good))}, which is complete"):
        check_whole(bad)
    prune(tmp_path, 1)  # the older one goes only if the newer one is whole
    assert names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("content", ["", "[]", "3", '{"student.safetensors": 3}', '{"training.pt": {}}'])
def test_a_damaged_manifest_is_damage(tmp_path: Path, content: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(content)
    assert "manifest.json is damaged" in str(damage(folder))


def test_a_checkpoint_of_an_older_version_has_no_manifest(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").unlink()
    assert damage(folder) is None
    (folder / "training.pt").unlink()
    assert str(damage(folder)).endswith("is not complete: it lacks training.pt")


def test_of_a_link_only_the_link_is_deleted(tmp_path: Path) -> None:
    far = save(tmp_path / "far", 1)
    save(tmp_path, 2)
    save(tmp_path, 3)
    (tmp_path / "checkpoints" / "step-000001").symlink_to(far)
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-000003"] and damage(far) is None


def test_only_complete_checkpoints_count_and_by_number(tmp_path: Path) -> None:
    for total in (1_000_000, 20, 3):
        save(tmp_path, total)
    place = tmp_path / "checkpoints"
    for name in (".step-000099.partial", "step-000099.partial", "step-99", "step-latest", "notes"):
        (place / name).mkdir()
    assert names(tmp_path) == ["step-000003", "step-000020", "step-1000000"]
    assert checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (1, [2, 5]), (3, [2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_pruning_keeps_the_newest_and_the_ends_of_stages(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    for total in range(1, 6):
        save(tmp_path, total, stage_end=total == 2)
    prune(tmp_path, limit)
    assert names(tmp_path) == [f"step-{total:06d}" for total in kept]


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "{", "[]", "3", "{}", '{"stage": 1}', json.dumps({"stage": 1, "step": 1, "steps": 1})),
        *(json.dumps(PROGRESS | wrong) for wrong in ({"step": -1}, {"step": "1"}, {"total": None}, {"stage": 1.0})),
        *(json.dumps(PROGRESS | wrong) for wrong in ({"prompts_consumed": 10**11}, {"total": 0}, {"batch": "8"})),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "progress.json").write_text(content)
    with pytest.raises(ConfigError, match="is no checkpoint") as error:
        read_progress(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    wide, untouched = Roles(width=4), Roles(width=4)
    with pytest.raises(ConfigError, match=r"student\.safetensors.*weight.*\(2, 3\)"):
        load_parameters(folder, "student", wide.tensors["student"])
    with pytest.raises(ConfigError, match=r"student\.safetensors.*extra"):
        load_parameters(folder, "student", wide.tensors["student"] | {"extra": nn.Parameter(torch.ones(1))})
    with pytest.raises(ConfigError, match=r"student\.safetensors.*bias"):
        load_parameters(folder, "student", {"weight": nn.Parameter(torch.ones(2, 3))})
    with pytest.raises(ConfigError, match="holds no reference"):
        load_parameters(folder, "reference", wide.tensors["student"])
    assert all(map(torch.equal, wide.state(), untouched.state()))


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    folder, roles = save(tmp_path, 1), Roles()
    file = folder / "student.safetensors"
    file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(ConfigError, match=r"student\.safetensors"):
        load_parameters(folder, "student", roles.tensors["student"])


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("loaded",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        [],
        {},
        None,
        {"moments": {}},
        {"moments": None, "extra": {}},
        {"moments": {}, "extra": 1},
        Malicious(),
    ],
)
def test_a_training_file_that_holds_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any
) -> None:
    folder = save(tmp_path, 1)
    if isinstance(content, bytes):
        (folder / "training.pt").write_bytes(content)
    else:
        torch.save(content, folder / "training.pt")
    with pytest.raises(ConfigError, match=r"training\.pt (is damaged|holds data that is not of a checkpoint)") as error:
        restore(folder, {}, {})
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("state", [None, [], {0: None}, {0: {"exp_avg": "x"}}])
def test_moments_that_do_not_fit_are_refused(tmp_path: Path, state: Any) -> None:
    folder, roles = save(tmp_path, 1), Roles()
    torch.save({"moments": {"student": state}, "extra": {}}, folder / "training.pt")
    with pytest.raises(ConfigError, match=r"training\.pt: the optimizer state of the student does not fit"):
        restore(folder, {}, {"student": roles.optimizers["student"]})


# --- Where a student comes from ------------------------------------------------------------------------------------


def test_initial_student_of_a_run_folder_is_the_last_of_its_stage_1(tmp_path: Path) -> None:
    for total, stage in ((1, 1), (2, 1), (3, 2)):
        save(tmp_path, total, stage=stage)
    assert find_initial(str(tmp_path)).name == "step-000002"


def test_initial_student_of_a_checkpoint_or_an_export_is_itself(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, stage=2)
    assert find_initial(str(folder)) == folder
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "sampling.json").write_text("{}")
    assert find_initial(str(tmp_path / "student")) == tmp_path / "student"


def test_initial_student_that_is_nothing_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 3, stage=2)
    for path in (tmp_path, tmp_path / "none", Path(checkpoint.__file__)):
        with pytest.raises(ConfigError, match=r"--init_student .* no checkpoint, no export, and no run folder"):
            find_initial(str(path))


def test_each_role_that_is_given_is_a_file(tmp_path: Path) -> None:
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "reference": {"weight": nn.Parameter(torch.ones(2))},
        "ema": {"weight": torch.zeros(2)},
    }
    folder = save_checkpoint(tmp_path, Progress(1, 1, 1, 1), tensors, {}, {})
    files = {"reference.safetensors", "ema.safetensors", "training.pt", "progress.json", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == files
    found = {role: {"weight": torch.full((2,), 9.0)} for role in tensors}
    assert restore(folder, found, {}) == {}
    assert found["reference"]["weight"].tolist() == [1, 1] and found["ema"]["weight"].tolist() == [0, 0]


def test_a_role_that_was_not_trained_has_no_moments(tmp_path: Path) -> None:
    folder, roles = save(tmp_path, 1), Roles()
    with pytest.raises(ConfigError, match="step-000001 holds no optimizer state of the critic"):
        restore(folder, {}, {"critic": roles.optimizers["student"]})


def test_a_plugins_state_comes_back_as_it_was(tmp_path: Path) -> None:
    """Whole tensors and shared ones, numbers without a dimension, and names that look alike with their places."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shared = [distribute_tensor(torch.full((3, 2), float(number)), mesh, [Shard(0)]) for number in range(5)]
        module = nn.BatchNorm1d(2).state_dict()
        state = {"a.b": shared[1], "a": {"b": shared[2], 0: shared[3], "0": shared[4]}, "module": module}
        state |= {"mean": shared[4].sum(), "whole": torch.ones(2), "names": ["x", None]}
        place, student = Progress(1, 1, 1, 1), {"student": {"weight": shared[0]}}
        saved = save_checkpoint(tmp_path, place, student, {}, {"objectives": state}, once=lambda act: act())
        for into in (student["student"]["weight"], torch.zeros(3, 2)):
            found = restore(saved, {"student": {"weight": into}}, {})["objectives"]
            assert is_shared(found["a.b"]) == is_shared(into)
            told = [found["a.b"], found["a"]["b"], found["a"][0], found["a"]["0"]]
            assert [whole(tensor).unique().tolist() for tensor in told] == [[1.0], [2.0], [3.0], [4.0]]
            assert found["mean"] == 24 and found["whole"].equal(torch.ones(2)) and found["names"] == ["x", None]
            assert found["module"]._metadata == module._metadata
    finally:
        torch.distributed.destroy_process_group()
