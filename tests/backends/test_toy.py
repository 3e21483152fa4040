"""The analytic mixture: its teacher against the density itself, its roles, and its image decoder."""

from pathlib import Path

import pytest
import torch

from dmdr.backends.images import to_unit_range
from dmdr.backends.toy import CENTRES, PROMPTS, STD, Redness, Toy, ToyBackend, ToyOptions, mixture_mean, posterior_mean
from dmdr.paths import RectifiedFlow, VariancePreserving, add_noise
from dmdr.protocols import Backend, NamedModel, Reward
from dmdr.rewards import Rewards
from dmdr.sampling import FewStepSampler, time_grid
from toy_trainer import cpu, prepared

FLOW = RectifiedFlow()
VP = VariancePreserving(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("path", [FLOW, VP])
@pytest.mark.parametrize("modes", [1, 4])
def test_posterior_means_obey_tweedie(path: FLOW.__class__, modes: int) -> None:
    """alpha E[x0 | x_t] = x_t + sigma^2 grad log p(x_t), with p by automatic differentiation of its density."""
    x_t = (2 * normal(50, 2)).requires_grad_()
    t = torch.full((50,), 0.6, dtype=torch.float64)
    alpha, sigma = path.alpha(t[0]), path.sigma(t[0])
    variance = alpha**2 * STD**2 + sigma**2
    centres = CENTRES[:modes].double()
    distance = (x_t[:, None] - alpha * centres).square().sum(-1)
    (score,) = torch.autograd.grad((-distance / (2 * variance)).logsumexp(1).sum(), x_t)
    expected = (x_t.detach() + sigma**2 * score) / alpha
    found = (
        mixture_mean(x_t.detach(), t, path, centres, STD)
        if modes > 1
        else posterior_mean(x_t.detach(), t, path, centres[0], STD)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_teacher_draws_the_data_in_many_steps() -> None:
    backend = prepared()
    cond = backend.encode([PROMPTS[k % 4] for k in range(4000)])
    sampler = FewStepSampler(backend.path, time_grid(100), 0.0)
    points = sampler.rollout(backend.teacher, normal(100, 4000, 2).float(), cond).final
    for k, centre in enumerate(CENTRES):
        mode = points[k::4]
        torch.testing.assert_close(mode.mean(0), centre, rtol=0, atol=4 * STD / 1000**0.5)
        torch.testing.assert_close(mode.std(0), torch.full((2,), STD), rtol=0, atol=0.03)


def test_guidance_interpolates_between_the_mixture_and_the_mode() -> None:
    backend = prepared()
    cond = backend.encode(PROMPTS)
    x_t, t = normal(4, 2).float(), torch.tensor([0.2, 0.5, 0.8, 1.0])
    u, c = (backend.teacher(x_t, t, cond, guidance=w).value for w in (0.0, 1.0))
    for w in (0.5, 3.0, 7.0):
        torch.testing.assert_close(backend.teacher(x_t, t, cond, guidance=w).value, u + w * (c - u), rtol=0, atol=2e-5)
    assert not torch.allclose(u, c)


def test_roles_start_as_the_teacher_and_differ_once_trained() -> None:
    backend = ToyBackend("", ToyOptions(seed=3))
    backend.prepare(cpu(), roles=("student", "fake_score", "reference"))
    cond, x_t, t = backend.encode(PROMPTS), normal(4, 2).float(), torch.full((4,), 0.7)
    teacher = backend.teacher(x_t, t, cond).value
    for role in (backend.student, backend.fake_score, backend.reference):
        assert torch.equal(role(x_t, t, cond).value, teacher)
    with torch.no_grad():
        backend.parameters("student")["net.4.bias"] += 1
        backend.parameters("fake_score")["net.4.bias"] += 2
    assert torch.equal(backend.reference(x_t, t, cond).value, teacher)
    assert torch.equal(backend.teacher(x_t, t, cond).value, teacher)
    torch.testing.assert_close(backend.student(x_t, t, cond).value, teacher + 1)
    torch.testing.assert_close(backend.teacher(x_t, t, cond, fake_mix=0.25).value, teacher + 0.5)
    assert torch.equal(backend.teacher(x_t, t, cond, fake_mix=1).value, backend.fake_score(x_t, t, cond).value)
    backend.snapshot()
    assert torch.equal(backend.reference(x_t, t, cond).value, backend.student(x_t, t, cond).value)
    with torch.no_grad():
        backend.parameters("student")["net.4.bias"] += 1
    assert not torch.equal(backend.reference(x_t, t, cond).value, backend.student(x_t, t, cond).value)


def test_only_trained_roles_take_gradients() -> None:
    backend = prepared(roles=("student", "fake_score", "reference"))
    cond, x_t, t = backend.encode(PROMPTS), normal(4, 2).float(), torch.full((4,), 0.7)
    assert backend.student(x_t, t, cond).x0.requires_grad
    assert backend.fake_score(x_t, t, cond).x0.requires_grad
    assert not backend.reference(x_t, t, cond).x0.requires_grad
    assert not backend.teacher(x_t, t, cond, guidance=3.0, fake_mix=0.5).x0.requires_grad
    assert prepared().parameters("reference") == {}


def test_images_show_the_point() -> None:
    backend = prepared()
    points = torch.tensor([[2.0, 0.0], [-4.0, 4.0], [0.0, -1.0]])
    images = backend.decode(points)
    assert (images.shape, images.dtype) == ((3, 3, 4, 4), torch.float32)
    assert images[:, :, 0, 0].tolist() == [[0.75, 0.5, 0.5], [0.0, 1.0, 0.5], [0.5, 0.375, 0.5]]
    torch.testing.assert_close(backend.encode_images(images), points)


def test_clamp_passes_gradients_straight_through() -> None:
    decoded = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    image = to_unit_range(decoded)
    assert image.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]
    image.sum().backward()
    assert decoded.grad is not None
    assert decoded.grad.tolist() == [0.5] * 6
    assert to_unit_range(decoded.detach().bfloat16()).dtype == torch.float32


def test_export_comes_back(tmp_path: Path) -> None:
    backend, other = prepared(), ToyBackend("", ToyOptions(seed=9))
    other.prepare(cpu(), roles=("student",))
    sampler = FewStepSampler(backend.path, time_grid(4), 1.0)
    assert backend.export(tmp_path, sampler) == {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    other.load_export(tmp_path)
    for name, value in backend.parameters("student").items():
        assert torch.equal(value, other.parameters("student")[name])
    assert "dmdr-sample" in backend.snippet("base", "prompt", sampler)


def test_preparing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ToyBackend("", ToyOptions(seed=1)).prepare(cpu(), roles=("student", "fake_score"))
    assert torch.equal(torch.get_rng_state(), before)


def test_toy_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDR_CACHE", str(tmp_path))
    model = Toy()
    assert isinstance(model, NamedModel)
    assert model.folder() == tmp_path / "toy"
    assert (model.folder() / "model_index.json").is_file()
    assert model.prompts() == [{"prompt": prompt} for prompt in PROMPTS]
    assert model.judge() is model.reward_checkpoint("toy") is None
    assert isinstance(ToyBackend("", ToyOptions()), Backend)


def test_redness_rises_to_the_right() -> None:
    reward = Redness()
    assert isinstance(reward, Reward)
    images = prepared().decode(torch.tensor([[-4.0, 0.0], [0.0, 1.0], [4.0, -1.0]]))
    assert Rewards({"toy": (2.0, reward)})(images, ["", "", ""]).tolist() == [0.0, 1.0, 2.0]
    assert reward.calls == 1


def test_noise_is_added_at_the_backends_own_path() -> None:
    backend = prepared()
    x0, eps, t = normal(4, 2), normal(4, 2, seed=1), torch.full((4,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(add_noise(backend.path, x0, eps, t), 0.7 * x0 + 0.3 * eps, rtol=0, atol=1e-15)
