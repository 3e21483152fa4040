"""Z-Image beyond what every family must show: texts of unequal length, what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import z_image
from dmdr.errors import ConfigError
from dmdr_z_image import ZImageBackend
from family import refuses_unread


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z_image")
    z_image.build(path)
    return path


def built(folder: Path, **options: Any) -> ZImageBackend:
    return ZImageBackend(str(folder), ZImageBackend.Options(**{"resolution": 16, "max_sequence_length": 60} | options))


@pytest.mark.parametrize("attention_backend", [None, "_native_flash"])
def test_texts_of_unequal_length_go_together(folder: Path, attention_backend: str | None) -> None:
    """Also with a kernel that takes no mask of what pads the shorter ones."""
    backend = built(folder, attention_backend=attention_backend)
    backend.prepare(Accelerator(cpu=True), roles=("student", "fake_score"))
    prompts = ["a handwritten seven on a page as long as can be", "", "a handwritten two on one that is as long"]
    cond = backend.encode(prompts)
    assert cond.tensors["sequence"].shape[:2] == (3, 60) and cond.tensors["length"].tolist() == [60, 19, 59]
    x_t, t = torch.randn(3, *backend.latent_shape), torch.tensor([0.6, 0.9, 0.3])
    together, (features,) = backend.student(x_t, t, cond).value, backend.features("teacher", x_t, t, cond, [0])
    for i, prompt in enumerate(prompts):
        asked = x_t[i : i + 1], t[i : i + 1], backend.encode([prompt])
        torch.testing.assert_close(together[i : i + 1], backend.student(*asked).value, rtol=1e-5, atol=1e-5)
        (alone,) = backend.features("fake_score", *asked, [0])
        torch.testing.assert_close(features[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert (together[1] - backend.student(x_t[1:2], t[1:2], backend.encode(prompts[:1])).value).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 65}, "--max_sequence_length 65: .* takes 64 at most"),
        ({"resolution": 18}, "--resolution 18 must be a multiple of 4"),
        ({"attention_backend": "flex"}, "--attention_backend flex in float32: .* does not support backward on CPU"),
        ({"attention_backend": "_native_cudnn"}, "--attention_backend _native_cudnn in float32: .*No viable backend"),
    ],
)
def test_refuses_in_one_line(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        built(folder, **options).prepare(Accelerator(cpu=True), roles=())
    assert "\n" not in str(error.value)


def test_a_kernel_that_only_infers_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inferring = lambda query, *others, **how: query.detach()  # noqa: E731
    monkeypatch.setattr("dmdr.backends.kernels.dispatch_attention_fn", inferring)
    with pytest.raises(ConfigError, match="--attention_backend native has no gradient"):
        built(folder, attention_backend="native").prepare(Accelerator(cpu=True), roles=())


def test_knows_no_zeros_and_needs_its_text_encoder(folder: Path) -> None:
    refuses_unread(folder, "drop_text_encoders", ["text_encoder"])
    refuses_unread(folder, "zero_empty_prompt", True)


def test_the_longest_text_and_the_image_behind_it_have_places(folder: Path) -> None:
    backend = built(folder, max_sequence_length=64)
    backend.prepare(Accelerator(cpu=True), roles=("student",))
    x_t = torch.randn(1, *backend.latent_shape)
    assert backend.teacher(x_t, torch.tensor([0.5]), backend.encode(["a" * 100])).value.isfinite().all()
