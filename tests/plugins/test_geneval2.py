"""GenEval 2's formulas on hand-made probabilities, and its judge in small."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark_parts import build_judge
from dmdr.benchmarks import Benchmark, KeptAnswers
from dmdr.errors import ConfigError, MissingFile
from dmdr.images import to_pil
from dmdr.rewards import require_columns
from dmdr.statistics import prompt_means
from dmdr.testing import check_reward
from dmdr_benchmarks.geneval2 import GenEval2, GenEval2Reward, geometric_mean
from dmdr_benchmarks.questions import Judge, wordings

CPU = torch.device("cpu")
ROWS: list[dict[str, Any]] = [  # invented, in the published layout
    {
        "prompt": "three blue mugs",
        "atom_count": 3,
        "vqa_list": [
            ["How many mugs are in the image?", "three"],
            ["Are the mugs blue?", "Yes"],
            ["Are there any mugs in the image?", "Yes"],
        ],
        "skills": ["count", "attribute", "object"],
    },
    {
        "prompt": "a glass owl on two ladders",
        "atom_count": 4,
        "vqa_list": [
            ["Is the owl made of glass?", "Yes"],
            ["How many ladders are in the image?", "two"],
            ["How many owls are in the image?", "one"],
            ["Is the owl on the ladders?", "Yes"],
        ],
        "skills": ["attribute", "count", "count", "position"],
    },
]


def test_an_answer_is_worded_in_several_ways() -> None:
    assert wordings("Yes") == ["yes", "Yes", " yes", " Yes"]
    assert wordings("three") == ["three", "Three", "3", " three", " Three", " 3"]
    assert {"10", " 10"} <= set(wordings("ten")) and len(wordings("eleven")) == 4


def test_the_geometric_mean_is_zero_if_an_atom_is() -> None:
    assert geometric_mean(torch.tensor([0.5, 0.5, 0.5])).item() == pytest.approx(0.5)
    assert geometric_mean(torch.tensor([0.9, 0.4, 0.1])).item() == pytest.approx((0.9 * 0.4 * 0.1) ** (1 / 3))
    assert geometric_mean(torch.tensor([1.0, 0.0, 1.0])).item() == 0
    assert geometric_mean(torch.full((3,), 1e-30)).item() == pytest.approx(1e-30)  # their product underflows


# --- Rows and figures -------------------------------------------------------------------------------------------------


def written(folder: Path, *rows: Any) -> str:
    path = folder / "geneval2_data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_rows_are_the_lines_of_the_file(tmp_path: Path) -> None:
    assert GenEval2().rows(written(tmp_path, *ROWS), "prompt") == ROWS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vqa_list": None}, r"vqa_list must be a list of \[question, answer\], not None"),
        ({"vqa_list": []}, "vqa_list must be"),
        ({"vqa_list": [["Is it?"]]}, "vqa_list must be"),
        ({"vqa_list": [["Is it?", 3]]}, "vqa_list must be"),
        ({"vqa_list": [["Is it?", " "]]}, "vqa_list must be"),
        ({"skills": ["count"]}, r"skills must name that of each of its 3 questions, not \['count'\]"),
        ({"skills": None}, "skills must name"),
        ({"atom_count": "3"}, "atom_count must be a whole number of at least 1, not '3'"),
    ],
)
def test_rows_without_questions_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = written(tmp_path, ROWS[1], ROWS[0] | change)
    with pytest.raises(ConfigError, match=f"--prompts: {path} row 2: {said}"):
        GenEval2().rows(path, "prompt")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        GenEval2().rows(str(tmp_path / "none.jsonl"), "prompt")
    with pytest.raises(ConfigError, match="line 2 is no JSON"):
        GenEval2().rows(written(tmp_path, ROWS[0], "{"), "prompt")
    with pytest.raises(ConfigError, match="row 1: vqa_list must be"):
        GenEval2().rows(written(tmp_path, {"prompt": "a"}), "prompt")


def answered(*atoms: list[float]) -> KeptAnswers:
    values = [torch.tensor(of, dtype=torch.float64) for of in atoms]
    am, gm = torch.stack([of.mean() for of in values]), torch.stack([geometric_mean(of) for of in values])
    return KeptAnswers({"am": am, "gm": gm, "atoms": [json.dumps(of) for of in atoms]})


def test_figures_are_means_by_prompt_by_skill_and_by_number_of_atoms() -> None:
    rows = [*ROWS, ROWS[1] | {"prompt": "a wooden owl on five ladders"}]
    atoms = [[0.2, 0.4, 0.9], [1.0, 0.5, 0.5, 0.25], [0.0, 0.7, 0.1, 0.6]]
    figures = GenEval2().figures(answered(*atoms), rows, None)
    assert list(figures) == ["gm", "am", "count", "attribute", "object", "position", "3 atoms", "4 atoms"]
    means = [100 * sum(of) / len(of) for of in atoms]
    roots = [100 * math.prod(of) ** (1 / len(of)) for of in atoms]
    assert figures["am"].value == pytest.approx(sum(means) / 3)
    assert figures["gm"].value == pytest.approx(sum(roots) / 3)
    assert figures["gm"].error == pytest.approx(torch.tensor(roots).double().std().item() / math.sqrt(3))
    # a skill is the mean of its atoms, of which a prompt may have several
    assert figures["count"].value == pytest.approx(100 * (0.2 + 0.5 + 0.5 + 0.7 + 0.1) / 5)
    assert figures["attribute"].value == pytest.approx(100 * (0.4 + 1 + 0) / 3)
    assert figures["position"].value == pytest.approx(100 * (0.25 + 0.6) / 2)
    assert figures["object"].value == pytest.approx(90) and math.isnan(figures["object"].error)
    assert figures["3 atoms"].value == pytest.approx(roots[0])
    assert figures["4 atoms"].value == pytest.approx((roots[1] + 0) / 2)
    prompts = [row["prompt"] for row in rows]
    for figure in figures.values():  # two models are compared by these
        assert figure.values is not None and figure.values.dtype == torch.float64 and len(figure.values) == 3
        assert prompt_means(figure.values, prompts).nanmean().item() == pytest.approx(figure.value)
    places = figures["position"].values
    assert places is not None and places.isnan().tolist() == [True, False, False]


def test_the_error_of_a_skill_is_that_of_a_ratio() -> None:
    """Of equally many atoms in all prompts, it is that of the prompts' means; of equal values, it is 0."""
    one = {"vqa_list": [["How many?", "two"]], "skills": ["count"], "atom_count": 3}
    two = {"vqa_list": [["How many?", "two"]] * 2, "skills": ["count"] * 2, "atom_count": 3}
    rows = [one | {"prompt": prompt} for prompt in "aabb"]  # two images a prompt
    error = GenEval2().figures(answered([0.2], [0.4], [0.5], [0.9]), rows, None)["count"].error
    assert error == pytest.approx(100 * torch.tensor([0.3, 0.7]).std().item() / math.sqrt(2))
    rows = [one | {"prompt": "a"}, two | {"prompt": "b"}]
    figure = GenEval2().figures(answered([0.4], [0.4, 0.4]), rows, None)["count"]
    assert figure.value == pytest.approx(40) and figure.error == pytest.approx(0, abs=1e-12)


def test_it_is_a_benchmark_whose_flags_are_checked() -> None:
    assert isinstance(GenEval2(), Benchmark)
    assert (GenEval2.images_per_prompt, GenEval2.layout) == (1, "flat")
    assert "my/judge" in GenEval2(judge="my/judge").about() and "CC BY-NC 4.0" in GenEval2().about()
    with pytest.raises(ConfigError, match="chunk_size must be at least 1, not 0"):
        GenEval2(chunk_size=0)


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("judge")
    return folder, *build_judge(folder)


def pictures(count: int) -> Tensor:
    noise = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (24, 32), mode="bicubic").clamp(0, 1)


def alone(judge: tuple[Path, Any, Any], image: Tensor, question: str) -> Tensor:
    """Probabilities of all first tokens by a forward pass of the model itself."""
    _, model, processor = judge
    text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[text], images=to_pil(image[None]), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, -1].softmax(-1).double()


def test_probabilities_are_those_of_the_first_tokens(judge: tuple[Path, Any, Any]) -> None:
    images = pictures(3)
    asked = [(i, question) for i in (2, 0, 1) for question in ("Is it red?", "How many tall trees are in the image?")]
    choices = [[wordings("three"), wordings("no")]] * 6
    letters = [["t", "T", "3", "Ġ"], ["n", "N", "Ġ"]]  # a token is a byte: " three" and " 3" begin with the same
    ids = [[judge[2].tokenizer.convert_tokens_to_ids(letter) for letter in of] for of in letters]
    each = [alone(judge, images[index], question) for index, question in asked]
    expected = torch.stack([torch.stack([chances[of].sum() for of in ids]) for chances in each])
    by_image = expected.view(3, 2, 2)
    assert by_image.std(0).max() > 1e-3 and by_image.diff(dim=1).abs().max() > 1e-3  # images and questions matter
    for chunk_size in (1, 4):  # the shorter questions are padded
        found = Judge(str(judge[0]), chunk_size, CPU, torch.float32).first_token_probabilities(images, asked, choices)
        assert found.dtype == torch.float64 and not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_images_are_judged_by_the_network(judge: tuple[Path, Any, Any]) -> None:
    images = pictures(2)
    benchmark = GenEval2(judge=str(judge[0]), chunk_size=3)
    benchmark.prepare(CPU, torch.float32)
    answers = benchmark.answers(images, ROWS)
    letters = {"Yes": "Yy", "one": "oO1", "two": "tT2", "three": "tT3"}
    am, gm, atoms = answers["am"], answers["gm"], [json.loads(str(text)) for text in answers["atoms"]]
    assert isinstance(am, Tensor) and isinstance(gm, Tensor) and am.shape == gm.shape == (2,)
    for image, row, values, mean, root in zip(images, ROWS, atoms, am.tolist(), gm.tolist(), strict=True):
        for value, (question, answer) in zip(values, row["vqa_list"], strict=True):
            tokens = judge[2].tokenizer.convert_tokens_to_ids([*letters[answer], "Ġ"])
            chance = alone(judge, image, question + " Answer in one word.")[tokens].sum().item()
            assert value == pytest.approx(chance, rel=1e-4)
        assert mean == pytest.approx(sum(values) / len(values))
        assert root == pytest.approx(math.prod(values) ** (1 / len(values)))
    assert GenEval2().figures(KeptAnswers(answers), ROWS, None)["am"].value == pytest.approx(100 * am.mean().item())
    half = GenEval2(judge=str(judge[0]))
    half.prepare(CPU, torch.bfloat16)
    close = half.answers(images, ROWS)["am"]
    assert isinstance(close, Tensor) and 0 < (close - am).abs().max() < 0.1


def test_a_reward_asks_the_same(judge: tuple[Path, Any, Any]) -> None:
    images = pictures(3)
    answers = GenEval2(judge=str(judge[0]))
    answers.prepare(CPU, torch.float32)
    expected = answers.answers(images[[0, 2]], ROWS)
    columns = {"vqa_list": [ROWS[0]["vqa_list"], None, ROWS[1]["vqa_list"]], "skills": [None] * 3}
    for mean, name in (("arithmetic", "am"), ("geometric", "gm")):
        reward = GenEval2Reward(judge=str(judge[0]), chunk_size=3, mean=mean)  # type: ignore[arg-type]
        reward.prepare(CPU, torch.float32)
        scores = reward(images, ["a"] * 3, **columns)
        assert scores.dtype == torch.float32 and scores[1].isnan()
        torch.testing.assert_close(scores[[0, 2]].double(), expected[name], rtol=1e-4, atol=1e-6)
    assert reward(images, ["a"] * 3, vqa_list=[None] * 3).isnan().all()
    with pytest.raises(ConfigError, match=r"vqa_list must hold lists of \[question, answer\], not \['Is it'\]"):
        reward(images, ["a"] * 3, vqa_list=[["Is it"]] * 3)
    with pytest.raises(ConfigError, match="mean must be 'arithmetic' or 'geometric', not 'am'"):
        GenEval2Reward(mean="am")  # type: ignore[arg-type]


def test_the_reward_keeps_its_contract(judge: tuple[Path, Any, Any]) -> None:
    check_reward(GenEval2Reward(judge=str(judge[0])), columns={"vqa_list": [row["vqa_list"] for row in ROWS * 2]})
    with pytest.raises(ConfigError, match="reward 'geneval2' needs the prompts to have a column 'vqa_list'"):
        require_columns("geneval2", GenEval2Reward, ["tag"])


def test_checkpoints_that_do_not_fit_are_refused(
    judge: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(name: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            GenEval2(judge=str(name)).prepare(CPU, torch.float32)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "judge nowhere is no folder; give one of a model of transformers, or a hub id" in refusal("nowhere")
    assert "cannot be loaded as AutoProcessor" in refusal(tmp_path)
    _, model, processor = judge
    processor.save_pretrained(tmp_path)
    assert "cannot be loaded as AutoModelForImageTextToText" in refusal(tmp_path)
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    assert "does not fit its architecture: 1 missing (lm_head.weight)" in refusal(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(tmp_path)
    monkeypatch.setattr("dmdr_benchmarks.loading.unreachable", lambda: "no network here")
    monkeypatch.setattr("dmdr_benchmarks.loading.cached_only", lambda: {"local_files_only": True})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(MissingFile, match=r"judge org/name cannot be fetched .* \(no network here\); download"):
        GenEval2(judge="org/name").prepare(CPU, torch.float32)
