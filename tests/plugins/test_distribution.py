"""The distribution table: ADM's conventions with torch-fidelity's Inception, DINOv2, and all kinds of references.

Inception has its real layers and random weights. Formulas are tried against NumPy, SciPy and torch-fidelity.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from dmdr import images
from dmdr.benchmarks import Benchmark, ComparesWithImages, KeptAnswers
from dmdr.cli import eval as evaluate
from dmdr.errors import ConfigError
from dmdr.metrics import Moments, frechet_distance, kernel_distance, neighbours
from dmdr_benchmarks import distribution
from dmdr_benchmarks.distribution import Distribution, diversity
from dmdr_digits import Digits
from dmdr_digits.data import scans
from pretend_device import DEVICE, pretended

inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

CPU = torch.device("cpu")
COUNT = 12  # images of a set; more than the 5 neighbours of density and coverage
NAMES = ["2048", "logits_unbiased"]
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
INCEPTION = ["FID", "sFID", "IS", "precision", "recall", "density", "coverage", "KID x 1000"]


def digits(count: int, start: int = 0) -> Tensor:
    """Scans, [count, 3, 8, 8], as files of 8 bits hold them."""
    return (scans().images[start : start + count] * 255).round() / 255


def blurred(count: int, start: int) -> Tensor:
    """Scans that a bad model could draw: smeared, and of another size."""
    small = torch.nn.functional.interpolate(digits(count, start), (6, 6), mode="bilinear", antialias=True)
    return (torch.nn.functional.interpolate(small, (16, 12), mode="bilinear") * 255).round() / 255


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in torch-fidelity's layout, of which the features stay in range through all layers."""

    class Empty(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            pass

    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        state = Empty("inception", NAMES).state_dict()
        for name, value in state.items():
            if value.ndim == 4:
                torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
            elif name.endswith("bn.bias"):
                value.normal_(std=0.1)
        state["fc.weight"].normal_(std=0.2)
        state["fc.bias"].normal_(std=3)  # ADM's logits are without it
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def theirs(weights: Path) -> Any:
    return inception.FeatureExtractorInceptionV3("inception", NAMES, feature_extractor_weights_path=str(weights))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random network; its positions are of another grid than that of 224 pixels, as those published are."""
    folder = tmp_path_factory.mktemp("dinov2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=28)
        )
        for name, weight in model.named_parameters():
            if "layer_scale" not in name:
                torch.nn.init.normal_(weight, std=1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(weights: Path) -> Distribution:
    """A benchmark that asks Inception."""
    benchmark = Distribution(reference_images="nowhere", networks="inception", inception=str(weights))
    benchmark.prepare(CPU, torch.bfloat16)  # which Inception does not heed
    return benchmark


@pytest.fixture(scope="module")
def sets(opened: Distribution) -> tuple[KeptAnswers, KeptAnswers]:
    """Inception's answers about real scans and about smeared ones."""
    with torch.no_grad():
        return KeptAnswers(opened.answers(digits(COUNT), [])), KeptAnswers(opened.answers(blurred(COUNT, 100), []))


def figures(reference: Path | str, answers: KeptAnswers, real: KeptAnswers | None, **options: Any) -> dict[str, float]:
    benchmark = Distribution(reference_images=str(reference), **({"networks": "inception"} | options))
    benchmark._device = CPU
    return {name: figure.value for name, figure in benchmark.figures(answers, rows_of(answers), real).items()}


def rows_of(answers: KeptAnswers) -> list[dict[str, str]]:
    return [{"prompt": str(i)} for i in range(len(answers))]


def values(kept: KeptAnswers, name: str) -> Tensor:
    return kept.tensor(name).whole()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- Inception ----------------------------------------------------------------------------------------------------


def test_features_and_logits_are_torch_fidelitys(opened: Distribution, theirs: Any) -> None:
    given = blurred(3, 50)
    pixels = (given.double().numpy() * 255).round().astype(np.uint8)
    spatial: list[Tensor] = []
    with torch.no_grad(), theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *seen: spatial.append(seen[2])):
        found = opened.answers(given, [])
        pool, logits = theirs(torch.from_numpy(pixels))
    assert torch.equal(found["pool"], pool) and pool.shape == (3, 2048)
    assert pool.std(0).mean() > 0.05 * pool.mean()  # or all images would look alike to it
    assert spatial[0].shape == (3, 192, 17, 17)
    expected = spatial[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(3, -1)  # as TensorFlow has it
    np.testing.assert_array_equal(found["spatial"], expected)
    assert expected.shape == (3, 2023) and (expected.min(), expected.std(0).max() > 0) == (0, True)  # after the ReLU
    np.testing.assert_allclose(logits, pool.numpy() @ theirs.fc.weight.numpy().T, rtol=1e-3, atol=1e-4)  # without bias
    exponents = np.exp(logits.numpy().astype(np.float64))
    np.testing.assert_allclose(found["probabilities"], exponents / exponents.sum(1, keepdims=True), rtol=1e-6)
    assert {value.dtype for value in found.values() if isinstance(value, Tensor)} == {torch.float32}


def test_an_answer_does_not_depend_on_the_batch(opened: Distribution, sets: tuple[KeptAnswers, KeptAnswers]) -> None:
    with torch.no_grad():
        alone = opened.answers(digits(1, 3), [])
    for name, value in alone.items():
        assert isinstance(value, Tensor)
        torch.testing.assert_close(value, values(sets[0], name)[3:4], rtol=1e-4, atol=1e-5)


def test_a_second_prepare_reads_no_layer_twice(weights: Path) -> None:
    benchmark = Distribution(reference_images="nowhere", networks="inception", inception=str(weights))
    for _ in range(2):
        benchmark.prepare(CPU, torch.float32)
    layer = benchmark._inception.Mixed_6d.branch1x1
    assert len(layer._forward_hooks) == 1
    assert not any(weight.requires_grad for weight in benchmark._inception.parameters())
    assert not benchmark._inception.training


# --- Figures ------------------------------------------------------------------------------------------------------


def by_scipy(real: np.ndarray, fake: np.ndarray) -> float:
    """As ADM's evaluator computes it, in float64."""
    first, second = (np.cov(each, rowvar=False) for each in (real, fake))
    shift = real.mean(0) - fake.mean(0)
    root = scipy.linalg.sqrtm(first @ second)
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


@pytest.mark.parametrize("few", [1000, 10])
def test_frechet_distances_of_halves_of_the_digits(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly of few images, by the covariances of more. Those here have a condition of 3e4 (features) and 45."""
    monkeypatch.setattr(distribution, "FEW", few)
    judge = Digits().judge()
    features, embedding = judge.features(scans().images), judge.embed(scans().images)
    classes = torch.full((898, 4), 0.25)
    real, fake = (
        KeptAnswers({"pool": features[half], "spatial": embedding[half], "probabilities": classes})
        for half in (slice(898), slice(899, None))
    )
    found = figures("nowhere", fake, real)
    lively = features.std(0) > 0  # SciPy's root needs it; the other 9 are 0 in all images, and add nothing
    assert lively.sum() == 55
    pairs = {"FID": features[:, lively], "sFID": embedding}
    for name, each in pairs.items():
        x, y = each[:898].double().numpy(), each[899:].double().numpy()
        assert found[name] == pytest.approx(by_scipy(x, y), rel=1e-6)


def test_frechet_distances_of_inception(sets: tuple[KeptAnswers, KeptAnswers]) -> None:
    """Of fewer images than numbers the covariances are singular: by their eigenvalues, in the space of all images."""
    found = figures("nowhere", sets[1], sets[0])
    assert list(found) == INCEPTION
    for name, features in (("FID", "pool"), ("sFID", "spatial")):
        real, fake = (values(each, features).double().numpy() for each in sets)
        basis = np.linalg.qr(np.concatenate([real, fake]).T)[0]
        first, second = (np.cov(each @ basis, rowvar=False) for each in (real, fake))
        roots = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0))
        shift = real.mean(0) - fake.mean(0)
        expected = shift @ shift + np.trace(first) + np.trace(second) - 2 * roots.sum()
        assert found[name] == pytest.approx(expected, rel=1e-6) and found[name] > 1e-3


def test_shares_are_those_of_brute_force(generator: torch.Generator) -> None:
    real, fake = torch.randn(60, 5, generator=generator), 0.7 * torch.randn(40, 5, generator=generator) + 0.4
    both_sets = [
        KeptAnswers({"pool": each, "spatial": each, "probabilities": each.softmax(1)}) for each in (fake, real)
    ]
    found = figures("nowhere", *both_sets)
    x, y = real.double().numpy(), fake.double().numpy()

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b) ** 2).sum(-1))

    def radii(a: np.ndarray, k: int) -> np.ndarray:
        return np.sort(distances(a, a), 1)[:, k]  # the nearest is the point itself

    both = distances(x, y)
    expected = {
        "precision": (both <= radii(x, 3)[:, None]).any(0).mean(),
        "recall": (both <= radii(y, 3)).any(1).mean(),
        "density": (both <= radii(x, 5)[:, None]).sum() / (5 * 40),
        "coverage": (both <= radii(x, 5)[:, None]).any(1).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert all(0.2 < found[name] < 0.98 for name in ("precision", "recall", "coverage"))


def test_kernel_distance_and_inception_score_are_torch_fidelitys(
    sets: tuple[KeptAnswers, KeptAnswers], theirs: Any
) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = figures("nowhere", sets[1], sets[0])
    given = {"kid_subsets": 1, "kid_subset_size": COUNT, "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1}
    given |= {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    given |= {"kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}
    real, fake = (values(each, "pool").double() for each in sets)
    kernel = kid_features_to_metric(fake, real, **given)["kernel_inception_distance_mean"]
    assert found["KID x 1000"] == pytest.approx(1000 * kernel, rel=1e-6)
    logits = values(sets[1], "pool") @ theirs.fc.weight.T
    score = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert found["IS"] == pytest.approx(score, rel=1e-5) and score > 1.01


def test_the_inception_score_is_the_mean_of_chunks_in_order(generator: torch.Generator) -> None:
    """The last chunk, of one image, counts as much as the others, as it does in ADM's evaluator."""
    p = torch.randn(10_001, 6, generator=generator).mul(2).softmax(1)
    p = p[p.argmax(1).argsort()]  # by class, as a careless list of labels has them
    features = torch.randn(10_001, 4, generator=generator)
    answers = KeptAnswers({"pool": features, "spatial": features, "probabilities": p})
    found = figures("nowhere", answers, None)
    scores = []
    for i in range(0, len(p), 5000):
        part = p[i : i + 5000].double().numpy()
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert found == pytest.approx({"IS": np.mean(scores)}, rel=1e-9)
    assert scores[-1] == 1


def test_dinov2_is_asked_as_in_its_paper(dinov2: Path) -> None:
    benchmark = Distribution(reference_images="nowhere", networks="dino", dinov2=str(dinov2))
    benchmark.prepare(CPU, torch.float32)
    network = Dinov2Model.from_pretrained(dinov2).eval()
    found = {}
    for name, given in (("real", digits(8)), ("fake", blurred(8, 100))):
        pixels = []
        for image in given.permute(0, 2, 3, 1).numpy():
            small = Image.fromarray((image * 255).round().astype(np.uint8)).resize((224, 224), Image.Resampling.BICUBIC)
            pixels.append((np.asarray(small) / 255 - MEAN) / DEVIATION)
        batch = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2)).float()
        with torch.no_grad():
            answers = benchmark.answers(given, [])
            expected = network(batch).last_hidden_state[:, 0]
        assert list(answers) == ["dinov2"]
        torch.testing.assert_close(answers["dinov2"], expected, rtol=1e-4, atol=1e-4)
        found[name] = KeptAnswers({"dinov2": expected})
    given = found["fake"], rows_of(found["fake"]), found["real"]
    figure = {name: each.value for name, each in benchmark.figures(*given).items()}
    real, fake = (values(found[name], "dinov2") for name in ("real", "fake"))
    distance = figure.pop("FD-DINOv2")
    assert distance == pytest.approx(frechet_distance(real, fake), rel=1e-6) and distance > 0.1
    near, wide = neighbours(real, fake), neighbours(real, fake, 5)  # without Inception, all is in this space
    expected = {"precision": near.precision, "recall": near.recall, "density": wide.density, "coverage": wide.coverage}
    assert figure == {**expected, "KID x 1000": 1000 * kernel_distance(real, fake)[0]}
    benchmark.prepare(CPU, torch.bfloat16)
    with torch.no_grad():
        rough = benchmark.answers(digits(8), [])["dinov2"]
    assert isinstance(rough, Tensor) and rough.dtype == torch.float32
    assert 0 < (rough - real).abs().max() < 0.5


def test_on_a_device(weights: Path, dinov2: Path, sets: tuple[KeptAnswers, KeptAnswers]) -> None:
    benchmark = Distribution(reference_images="nowhere", inception=str(weights), dinov2=str(dinov2))
    with torch.no_grad(), pretended():
        benchmark.prepare(DEVICE, torch.float32)
        answers = benchmark.answers(digits(2).to(DEVICE), [])
        assert {value.device.type for value in answers.values() if isinstance(value, Tensor)} == {DEVICE.type}
        for name in ("pool", "spatial", "probabilities"):
            found = answers[name]
            assert isinstance(found, Tensor)
            torch.testing.assert_close(found.cpu(), values(sets[0], name)[:2], rtol=1e-4, atol=1e-5)


# --- References ---------------------------------------------------------------------------------------------------


def statistics(kept: KeptAnswers) -> dict[str, np.ndarray]:
    """As ADM's files have them: the means in float32."""
    found = {}
    for end, name in (("", "pool"), ("_s", "spatial")):
        features = values(kept, name).double().numpy()
        found |= {f"mu{end}": features.mean(0).astype(np.float32), f"sigma{end}": np.cov(features, rowvar=False)}
    return found


def pixels(given: Tensor) -> np.ndarray:
    return (given * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def test_references(sets: tuple[KeptAnswers, KeptAnswers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, images, images with statistics of others, and statistics alone."""
    real, fake = sets
    known, shown = statistics(real), pixels(blurred(COUNT, 100))
    np.savez(tmp_path / "images.npz", shown)
    np.savez(tmp_path / "alone.npz", mu=known["mu"], sigma=known["sigma"])
    np.savez(tmp_path / "adm.npz", arr_0=shown, **known)
    made = {
        name: Distribution(reference_images=str(tmp_path / name)) for name in ("images.npz", "alone.npz", "adm.npz")
    }
    for name in ("images.npz", "adm.npz"):
        assert isinstance(made[name], Benchmark) and isinstance(made[name], ComparesWithImages)
        assert made[name].compared_with() == str(tmp_path / name)
    assert Distribution(reference_images=str(tmp_path)).compared_with() == str(tmp_path)
    alone = made["alone.npz"]
    assert alone.compared_with() is None
    assert "dinov2" not in alone.about() and "dinov2-large" in made["adm.npz"].about()

    alone._device = CPU
    found = {name: figure.value for name, figure in alone.figures(fake, [], None).items()}
    expected = figures(tmp_path, fake, real)
    assert list(found) == ["FID", "IS"]
    # The mean in float32, and roots of eigenvalues that should be 0, cost digits.
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)

    # The statistics beside images count, whatever the images are.
    def by_size(real: Moments, fake: Moments) -> float:
        np.testing.assert_array_equal(real.covariance, known["sigma" if len(real.mean) == 2048 else "sigma_s"])
        return float(len(fake.mean))

    monkeypatch.setattr(distribution, "frechet_distance_of_moments", by_size)
    both = figures(tmp_path / "adm.npz", fake, fake)
    assert list(both) == INCEPTION
    assert (both["FID"], both["sFID"], both["IS"]) == (2048, 2023, found["IS"])
    assert (both["precision"], both["recall"], both["coverage"]) == (1, 1, 1)
    same = figures(tmp_path / "images.npz", fake, fake)
    assert same["FID"] == pytest.approx(0, abs=1e-6) and same["KID x 1000"] < 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"mu": np.zeros(64), "sigma": np.eye(64)},
            "needs mu [2048] and sigma [2048, 2048] of Inception, and has mu [64",
        ),
        ({"mu": np.zeros((1, 2048)), "sigma": np.zeros(3)}, "and has mu [1, 2048] and sigma [3]"),
        ({"mu": np.zeros(2048)}, "needs mu [2048] and sigma [2048, 2048] of Inception, and has mu [2048]"),
        ({"mu_s": np.zeros(2048), "sigma_s": np.eye(2)}, "needs mu_s [2023] and sigma_s [2023, 2023] of Inception"),
        ({"mu_s": np.full(2023, np.nan), "sigma_s": np.zeros((2023, 2023))}, "has numbers in mu_s or sigma_s that are"),
        ({"mu": np.array(["a"]), "sigma": np.eye(3)}, "cannot be read: ValueError: could not convert string"),
        ({"other": np.zeros(3)}, "has neither images ('arr_0') nor 'mu' and 'sigma'"),
        (None, "cannot be read: FileNotFoundError"),
        ("a text", "is no .npz file"),
    ],
)
def test_references_that_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    """At the first look, before any network is loaded."""
    file = tmp_path / "reference.npz"
    if isinstance(content, dict):
        np.savez(file, **content)
    elif content:
        file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        Distribution(reference_images=str(file)).compared_with()
    assert str(refused.value).startswith(f"{file} ") and said in str(refused.value)


def test_other_refusals(sets: tuple[KeptAnswers, KeptAnswers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "mu.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ConfigError, match=r"mu.npz has no images \('arr_0'\), which --networks dino needs"):
        Distribution(reference_images=str(tmp_path / "mu.npz"), networks="dino").compared_with()
    five = KeptAnswers({name: value[:5] for name, value in sets[0].given.items()})
    for pair in ((five, sets[1]), (sets[1], five)):
        with pytest.raises(ConfigError, match="more than 5 images of each, not 5"):
            figures("nowhere", *pair)
    with pytest.raises(ConfigError, match="more than 5 images of each, not 5"):
        figures("nowhere", five, None)

    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "few.pth")
    torch.save(Path(tmp_path), tmp_path / "code.pth")  # a pickle of more than tensors
    for name in ("text.pth", "few.pth", "code.pth", "none.pth"):
        benchmark = Distribution(reference_images=str(tmp_path), networks="inception", inception=str(tmp_path / name))
        with pytest.raises(ConfigError) as refused:
            benchmark.prepare(CPU, torch.float32)
        message = str(refused.value)
        assert message.startswith(f"inception: weights {tmp_path / name} cannot be loaded (")
        assert message.endswith("); give a local file with --inception") and "\n" not in message

    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    with pytest.raises(
        ConfigError, match=r"the weights cannot be fetched \(URLError: <urlopen error no route>\); give"
    ):
        Distribution(reference_images=str(tmp_path), networks="inception").prepare(CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"dinov2 .* is no folder"):
        Distribution(reference_images=str(tmp_path), networks="dino", dinov2=str(tmp_path / "no")).prepare(
            CPU, torch.float32
        )
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ConfigError, match=r"needs the package .*: pip install 'dmdr\[fid\]'"):
        Distribution(reference_images=str(tmp_path), networks="inception").prepare(CPU, torch.float32)


# --- The command --------------------------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run dmdr-eval in this process, where there are folders of digits: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, found in (
        ("real", digits(COUNT)),
        ("fake_a", digits(COUNT, 40)),
        ("fake_b", blurred(COUNT, 100)),
    ):
        for i, image in enumerate(images.to_pil(found)):
            images.save(image, tmp_path / name / f"{i}.png")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/dmdr-eval", *arguments])
        with pytest.raises(SystemExit) as end:
            evaluate.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def test_the_command(
    call: Callable[..., Any], weights: Path, dinov2: Path, sets: tuple[KeptAnswers, KeptAnswers], tmp_path: Path
) -> None:
    asked = ("fake_a", "fake_b", "--benchmark=distribution", "--reference_images=real", "--device=cpu")
    networks = (f"--inception={weights}", f"--dinov2={dinov2}")
    code, out, err = call(*asked, *networks)
    assert code == 0, err
    about, heading, first, second = out.splitlines()[:4]
    assert about == (
        "Distances to 12 images of real by torch-fidelity's Inception (IS: the mean over each 5,000 images in their "
        f"order) and {dinov2}. Images that dmdr draws are rounded to 8 bits; ADM truncates."
    )
    assert heading.split() == ["model", *" ".join([*INCEPTION, "FD-DINOv2", "images"]).split()]
    models = json.loads((tmp_path / "evaluation/distribution.json").read_text())["models"]
    table = {name: repetitions[0] for name, repetitions in models.items()}
    expected = figures("real", sets[1], sets[0])
    for name, value in expected.items():
        assert table["fake_b"]["figures"][name]["value"] == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert table["fake_a"]["figures"]["FID"]["value"] < table["fake_b"]["figures"]["FID"]["value"]
    assert all(math.isfinite(figure["value"]) for figure in table["fake_a"]["figures"].values())
    fid = table["fake_a"]["figures"]["FID"]
    assert f"{fid['value']:.2f} ± {fid['standard_error']:.2f}" in first
    assert f"{table['fake_b']['figures']['precision']['value']:.4f} ± " in second
    for form in ("json", "md", "tex"):
        assert (tmp_path / f"evaluation/distribution.{form}").is_file()
    assert not list(tmp_path.rglob("*.csv"))  # there is nothing to say of one image

    shards = sorted((tmp_path / "evaluation").rglob("*.safetensors"))
    assert [file.parts[-3] for file in shards] == ["fake_a", "fake_b", "reference"]
    before = [file.stat().st_mtime_ns for file in shards]
    code, again, err = call(*asked, *networks)
    assert (code, again) == (0, out), err
    assert [file.stat().st_mtime_ns for file in shards] == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "benchmark 'distribution' needs --reference_images"),
        (("--reference_images=nowhere",), "no such folder: nowhere"),
        (("--reference_images=none.npz",), "none.npz cannot be read: FileNotFoundError"),
        (
            ("--reference_images=mu.npz",),
            "mu.npz needs mu [2048] and sigma [2048, 2048] of Inception, and has mu [3]",
        ),
        (("--reference_images=flat.npz",), "flat.npz: 'arr_0' must be uint8 [N, height, width, 3], not float64 [4]"),
        (("--reference_images=real", "--networks=clip"), "--networks"),
        (
            ("--reference_images=real", "--networks=inception", "--inception=none.pth"),
            "inception: weights none.pth cannot be",
        ),
        (("--reference_images=real", "--networks=dino", "--dinov2=real/0.png"), "dinov2 real/0.png is no folder"),
        (
            ("--reference_images=real", "--networks=dino", "--dinov2=real"),
            "dinov2 real cannot be loaded as Dinov2Model",
        ),
        (
            ("--reference_images=real", "--networks=dino"),
            "dinov2 facebook/dinov2-large cannot be fetched from the hub",
        ),
    ],
)
def test_bad_input_of_the_command(
    call: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    np.savez("mu.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("flat.npz", np.zeros(4))
    code, out, err = call("fake_a", "--benchmark=distribution", "--device=cpu", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("dmdr-eval: ") and said in err
    assert not (tmp_path / "evaluation").exists()


def test_too_few_images_are_refused(call: Callable[..., Any], dinov2: Path, tmp_path: Path) -> None:
    for i in range(4, COUNT):
        (tmp_path / "real" / f"{i}.png").unlink()
    flags = ("--reference_images=real", "--networks=dino", f"--dinov2={dinov2}", "--device=cpu")
    code, out, err = call("fake_a", "--benchmark=distribution", *flags)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "dmdr-eval: distribution needs more than 5 images of each, not 4"


def test_diversity_is_of_the_images_of_one_prompt() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    found = diversity(features, ["a", "a", "b", "a", "b"])
    cosines = [0.0, 0.5**0.5, 0.5**0.5]  # of the pairs of a; b's is -1
    assert found[[0, 1, 3]].tolist() == pytest.approx([1 - sum(cosines) / 3] * 3)
    assert found[[2, 4]].tolist() == pytest.approx([2.0] * 2)
    assert diversity(features[:1], ["a"]).isnan().all()


def test_distances_have_standard_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 images about as large as the differences between sets of images."""
    generator = torch.Generator().manual_seed(0)
    real = KeptAnswers({"dinov2": torch.randn(300, 4, generator=generator)})
    benchmark = Distribution(reference_images="nowhere", networks="dino")
    benchmark._device = CPU
    rows = [{"prompt": str(i)} for i in range(200)]
    found = []
    for _ in range(8):
        fake = KeptAnswers({"dinov2": 1.3 * torch.randn(200, 4, generator=generator)})
        found.append(benchmark.figures(fake, rows, real))
    for name in ("FD-DINOv2", "KID x 1000", "density", "precision"):
        errors = torch.tensor([each[name].error for each in found])
        spread = torch.tensor([each[name].value for each in found]).std().item()
        assert 0.5 * spread < errors.mean().item() < 2 * spread, name
    monkeypatch.setattr(distribution, "SMALL", 199)
    few = benchmark.figures(fake, rows, real)
    assert math.isnan(few["FD-DINOv2"].error)
    assert few["recall"].error == pytest.approx(math.sqrt(few["recall"].value * (1 - few["recall"].value) / 300))
