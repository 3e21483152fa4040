"""GenEval's rules on hand-made detections, and its two networks in small."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

import parts
from dmdr.benchmarks import Benchmark, KeptAnswers
from dmdr.errors import ConfigError
from dmdr.images import to_pil
from dmdr.statistics import prompt_means
from dmdr_benchmarks.detector import CLASSES, COLOURS, TEMPLATES, Colours, Detector, Found
from dmdr_benchmarks.geneval import GenEval
from dmdr_benchmarks.geneval_rules import TAGS, kept, lacks, relations

CPU = torch.device("cpu")
NOTHING = torch.zeros(0, dtype=torch.bool)
ROWS: list[dict[str, Any]] = [  # invented, in the published layout
    {"tag": "single_object", "include": [{"class": "vase", "count": 1}], "prompt": "a photo of a vase"},
    {
        "tag": "counting",
        "include": [{"class": "fork", "count": 3}],
        "exclude": [{"class": "fork", "count": 4}],
        "prompt": "a photo of three forks",
    },
    {
        "tag": "position",
        "include": [{"class": "cup", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a cup",
    },
]


def found(label: str, score: float = 0.95, box: Sequence[float] = (0, 0, 10, 10)) -> Found:
    left, top, right, bottom = box
    return Found(label, score, (left, top, right, bottom), NOTHING)


def named(*colours: str) -> Any:
    """A classifier that gives these colours, in the order of the objects."""
    return lambda objects, label: list(colours[: len(objects)])


def verdict(row: dict[str, Any], objects: Sequence[Found], *colours: str) -> str:
    return lacks(row, kept(objects, row["tag"]), named(*colours))


# --- Rules ------------------------------------------------------------------------------------------------------------


def test_scores_are_above_the_threshold_of_the_tag_and_the_best_count() -> None:
    scores = [0.3, 0.31, 0.9, 0.91]
    objects = [found("fork", score) for score in scores] + [found("cup", 0.3)]
    assert {label: [one.score for one in of] for label, of in kept(objects, "two_object").items()} == {
        "fork": [0.91, 0.9, 0.31]
    }
    assert [one.score for one in kept(objects, "counting")["fork"]] == [0.91]
    many = [found("fork", 0.5 + i / 100) for i in range(20)]
    assert [one.score for one in kept(many, "colors")["fork"]] == [0.5 + i / 100 for i in range(19, 3, -1)]


def test_objects_must_be_there_and_more_do_no_harm_unless_excluded() -> None:
    single, counting, _ = ROWS
    assert verdict(single, [found("vase")]) == verdict(single, [found("vase", 0.4)] * 5 + [found("cup")]) == ""
    assert verdict(single, [found("cup")]) == "expected vase>=1, found 0"
    assert verdict(counting, [found("fork")] * 3) == ""
    assert verdict(counting, [found("fork")] * 2 + [found("fork", 0.89)]) == "expected fork>=3, found 2"
    assert verdict(counting, [found("fork")] * 4) == "expected fork<4, found 4"
    assert verdict(counting, [found("fork")] * 30) == "expected fork<4, found 16"
    both = {"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "cat", "count": 2}]}
    assert verdict(both, [found("cat")]) == "expected cup>=1, found 0\nexpected cat>=2, found 1"


def test_the_best_objects_must_have_the_colour() -> None:
    row = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
    assert verdict(row, [found("cup")], "red") == ""
    wrong = "expected red cup>=1, found 0 red; and 1 blue"
    assert verdict(row, [found("cup", 0.9), found("cup", 0.8)], "blue", "red") == wrong  # the second is not asked
    two = {"tag": "color_attr", "include": [{"class": "cup", "count": 2, "color": "red"}]}
    assert verdict(two, [found("cup")] * 2, "red", "red") == ""
    assert verdict(two, [found("cup")] * 2, "white", "red") == "expected red cup>=2, found 1 red; and 1 red, 1 white"


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        # centres 100 apart, sizes 10 + 10: 98 of 100 are left
        ((-100, 0, -90, 10), ["left of"]),
        ((100, 0, 110, 10), ["right of"]),
        ((0, -100, 10, -90), ["above"]),  # y points down
        ((0, 100, 10, 110), ["below"]),
        ((100, 100, 110, 110), ["right of", "below"]),
        ((-100, -100, -90, -90), ["left of", "above"]),
        ((0, 0, 10, 10), []),  # the same place
        ((1.9, 0, 11.9, 10), []),  # less than a tenth of 20 apart
        ((3.9, 0, 13.9, 10), []),  # 1.9 of 3.9 are left, less than half
        ((4.1, 0, 14.1, 10), ["right of"]),  # 2.1 of 4.1 are
        # 10 and 5.5 apart: (8, 3.5) left. Of the whole distance, 11.41, that is .70 and .31. Of what is left it would
        # be .92 and .40; and without margins .48.
        ((10, 5.5, 20, 15.5), ["right of"]),
        # 10 and 6.9 apart: (8, 4.9) left, .66 and .40 of 12.15; of what is left, .85 and .52.
        ((10, 6.9, 20, 16.9), ["right of"]),
    ],
)
def test_places_are_those_of_the_centres_less_a_margin(box: Sequence[float], expected: list[str]) -> None:
    assert relations(found("cat", box=box), found("cup")) == expected


def test_the_margin_is_of_the_sizes_along_each_axis() -> None:
    wide = found("cup", box=(-50, 0, 60, 10))  # its centre is at 5, its width 110
    assert relations(found("cat", box=(23, 0, 33, 10)), wide) == []  # 23 - 12 = 11, .48 of 23
    assert relations(found("cat", box=(25, 0, 35, 10)), wide) == ["right of"]  # 25 - 12 = 13, .52 of 25
    assert relations(found("cat", box=(0, 25, 10, 35)), wide) == ["below"]  # 25 - 2


def test_each_must_be_in_its_place_to_each_target_if_both_are_right() -> None:
    row = ROWS[2]
    cup, left, right = (found(label, box=(x, 0, x + 10, 10)) for label, x in (("cup", 0), ("cat", -50), ("cat", 50)))
    assert verdict(row, [cup, left]) == ""
    assert verdict(row, [cup, right]) == "expected cat left of target, found right of target"
    assert verdict(row, [left]) == "expected cup>=1, found 0\nno target for cat to be left of"
    assert verdict(row, [cup]) == "expected cat>=1, found 0"  # and nothing about its place
    cats = {"tag": "position", "include": [row["include"][0], row["include"][1] | {"count": 2}]}
    assert verdict(cats, [cup, left, left]) == ""
    assert verdict(cats, [cup, left, right]) == "expected cat left of target, found right of target"
    assert verdict(cats, [cup, left, found("cat", box=(0, 0, 10, 10))]) == "expected cat left of target, found  target"
    coloured = {"tag": "position", "include": [row["include"][0] | {"color": "red"}, row["include"][1]]}
    wrong = "expected red cup>=1, found 0 red; and 1 pink\nno target for cat to be left of"
    assert verdict(coloured, [cup, left], "pink") == wrong
    own = {"tag": "position", "include": [row["include"][0], row["include"][1] | {"color": "black"}]}
    assert verdict(own, [cup, right], "pink") == "expected black cat>=1, found 0 black; and 1 pink"


def test_the_classes_are_cocos_with_three_names_of_the_prompts() -> None:
    assert len(set(CLASSES)) == 80 and len(COLOURS) == 10
    places = {
        0: "person",
        13: "bench",
        41: "cup",
        63: "laptop",
        64: "computer mouse",
        65: "tv remote",
        79: "toothbrush",
    }
    assert {i: CLASSES[i] for i in places} == places and CLASSES[66] == "computer keyboard"


# --- Rows and figures -------------------------------------------------------------------------------------------------


def written(folder: Path, *rows: Any) -> str:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_rows_are_the_lines_of_the_file(tmp_path: Path) -> None:
    again = [*ROWS, ROWS[0]]  # a prompt that comes twice counts twice
    assert GenEval().rows(written(tmp_path, *again), "prompt") == again
    full = ROWS[0] | {"exclude": None, "include": [{"class": "vase", "count": 1, "color": None, "position": None}]}
    assert GenEval().rows(written(tmp_path, full), "prompt") == [ROWS[0]]  # the published scorer reads no nulls
    other = [{"text": row["prompt"]} | {k: v for k, v in row.items() if k != "prompt"} for row in ROWS]
    assert GenEval().rows(written(tmp_path, *other), "text") == ROWS


def include(**changes: Any) -> dict[str, Any]:
    return ROWS[2] | {"include": [ROWS[2]["include"][0], ROWS[2]["include"][1] | changes]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROWS[0] | {"tag": "colour"}, "tag must be one of single_object, two_object, .*, not 'colour'"),
        ({"prompt": "a"}, "tag must be .* not None"),
        (ROWS[0] | {"include": []}, r"include must be a list of at least one object, not \[\]"),
        (ROWS[0] | {"include": ["cup"]}, r"include\[0\] must be an object with class and count, not 'cup'"),
        (ROWS[1] | {"exclude": {"class": "fork"}}, "exclude must be a list"),
        (ROWS[1] | {"exclude": [{"class": "fork"}]}, r"count of exclude\[0\] must be a whole number .* not None"),
        (include(**{"class": "mouse"}), r"class of include\[1\] must be one of COCO's 80, .* not 'mouse'"),
        (include(count=0), r"count of include\[1\] must be"),
        (include(color="grey"), r"color of include\[1\] must be one of red, .*, white, not 'grey'"),
        (include(position=["near", 0]), r"position of include\[1\] must be \[one of left of, .* not \['near', 0\]"),
        (include(position=["above", 1]), r"position of include\[1\] must be"),
        (include(position=["above", -1]), r"position of include\[1\] must be"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = written(tmp_path, *ROWS, row)
    with pytest.raises(ConfigError, match=f"--prompts: {path} row 4: {said}") as caught:
        GenEval().rows(path, "prompt")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        GenEval().rows(str(tmp_path / "none.jsonl"), "prompt")
    with pytest.raises(ConfigError, match="line 2 is no JSON"):
        GenEval().rows(written(tmp_path, ROWS[0], '{"tag": '), "prompt")
    with pytest.raises(ConfigError, match="line 1 must be an object with text under the key 'caption'"):
        GenEval().rows(written(tmp_path, *ROWS), "caption")


def test_overall_is_the_mean_of_the_tags_whatever_their_numbers_of_prompts() -> None:
    rows = [{"tag": "colors", "prompt": p} for p in "abc" for _ in range(4)]
    rows += [{"tag": "counting", "prompt": p} for p in "de" for _ in range(4)]
    correct = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0.0])
    figures = GenEval().figures(KeptAnswers({"correct": correct}), rows, None)
    assert list(figures) == ["overall", "counting", "colors"]  # the other tags have no prompt, and do not count
    assert figures["colors"].value == pytest.approx(0.5)
    assert figures["counting"].value == pytest.approx(0.5)
    assert figures["colors"].error == pytest.approx(0.5 / math.sqrt(3))  # of 1, .5 and 0
    assert figures["counting"].error == pytest.approx(math.sqrt(0.125 / 2))  # of .25 and .75
    assert figures["overall"].error == pytest.approx(math.sqrt(0.25 / 3 + 0.0625) / 2)

    correct[12:] = 1
    figures = GenEval().figures(KeptAnswers({"correct": correct}), rows, None)
    overall = figures["overall"]
    assert overall.value == pytest.approx((0.5 + 1) / 2) != correct.mean().item()
    assert overall.values is not None and overall.values.mean().item() == pytest.approx(overall.value)
    torch.testing.assert_close(overall.values, correct.double() * torch.tensor([20 / 24] * 12 + [20 / 16] * 8).double())
    counting = figures["counting"].values
    assert counting is not None and counting[:12].isnan().all() and counting[12:].eq(1).all()
    assert prompt_means(counting, [row["prompt"] for row in rows]).nanmean() == figures["counting"].value == 1


def test_it_is_a_benchmark_whose_flags_are_checked() -> None:
    assert isinstance(GenEval(), Benchmark)
    assert (GenEval.images_per_prompt, GenEval.layout) == (4, "samples")
    assert "my/detector" in GenEval(detector="my/detector").about() and "mmdetection" in GenEval().about()
    with pytest.raises(ConfigError, match="chunk_size must be at least 1, not 0"):
        GenEval(chunk_size=0)


# --- Networks ---------------------------------------------------------------------------------------------------------


def build_detector(folder: Path, classes: int = 80) -> Mask2FormerForUniversalSegmentation:
    swin: dict[str, Any] = {
        "image_size": 32,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    sizes: dict[str, Any] = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "dim_feedforward": 16,
        "encoder_feedforward_dim": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "num_queries": 12,
        "num_labels": classes,
    }
    config = Mask2FormerConfig(backbone_config=SwinConfig(**swin), **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Mask2FormerForUniversalSegmentation(config)
        with torch.no_grad():
            model.class_predictor.weight.mul_(60)  # or no class would be probable
            model.model.pixel_level_module.decoder.mask_projection.weight.mul_(30)  # and no mask sure
            model.class_predictor.bias[-1] = -30  # nothing is not an answer
    model.save_pretrained(folder)
    return model.eval()


def build_clip(folder: Path) -> None:
    words = parts.clip_tokenizer()
    words.model_max_length = 77
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    vision = sizes | {"image_size": 16, "patch_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 if weight.ndim < 2 else 4)
    for part in (model, words):
        part.save_pretrained(folder)
    size = {"shortest_edge": 16}
    CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16}).save_pretrained(folder)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    build_detector(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    build_clip(folder)
    return folder


def pictures(count: int, height: int, width: int) -> Tensor:
    """Smooth, with 8-bit values."""
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return (large * 255).round() / 255


def test_objects_are_those_of_transformers_where_nothing_is_resized(
    detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own reading has masks of 384 x 384 pixels always, which ours has for images and inputs of that size."""
    monkeypatch.setattr("dmdr_benchmarks.detector.LARGEST", 12)  # it looks at as many as there are queries
    images = pictures(2, 384, 384)
    ours = Detector(str(detector), 384, CPU)(images, 0.3)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
    reader = Mask2FormerImageProcessor(size={"height": 384, "width": 384})
    with torch.no_grad():
        outputs = model(pixel_values=reader(to_pil(images), return_tensors="pt")["pixel_values"])
    theirs = reader.post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(384, 384)] * 2, return_binary_maps=True
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == len(other["segments_info"]) > 1
        assert [one.score for one in mine] == sorted((one.score for one in mine), reverse=True)
        expected = sorted(zip(other["segments_info"], other["segmentation"], strict=True), key=lambda x: -x[0]["score"])
        for one, (info, mask) in zip(mine, expected, strict=True):
            assert one.label == CLASSES[info["label_id"]] and one.score == pytest.approx(info["score"], abs=1e-4)
            assert (one.mask != mask.bool()).float().mean() < 1e-3
            left, top, right, bottom = (int(edge) for edge in one.box)
            assert one.mask[top:bottom, left:right].sum() == one.mask.sum()
            assert all(edge.any() for edge in (one.mask[top], one.mask[bottom - 1]))
            assert all(edge.any() for edge in (one.mask[:, left], one.mask[:, right - 1]))


def test_scores_and_boxes_are_those_of_the_masks(detector: Path) -> None:
    """Of hand-made answers: probability of the class times the mean of the mask's pixels, at the size of the image."""
    classes = torch.full((1, 3, 81), -30.0)
    classes[0, 0, 41] = classes[0, 1, 15] = 10
    classes[0, 2, [41, 15, 80]] = torch.tensor([0.6, 0.3, 0.1]).log()  # the last is nothing
    masks = torch.full((1, 3, 24, 24), -9.0)
    masks[0, 0, 4:8, 8:20] = 9
    masks[0, 2] = math.log(3)  # three quarters
    masks[0, 2, :, 16:] = math.log(9)

    network = Detector(str(detector), 48, CPU)
    network._model = lambda pixel_values: SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    ((cup, third),) = network(torch.zeros(1, 3, 24, 24), 0.3)  # 48 pixels, padded to 64; one mask is empty
    assert (cup.label, third.label) == ("cup", "cup")
    # 24 mask pixels are 64 padded ones, of which 48 are the image's 24: a mask pixel is 4 / 3 of the image's.
    assert cup.box == (11, 5, 24, 11) and cup.mask[5:11, 11:24].all() and cup.mask.sum() == 6 * 13
    assert 0.95 < cup.score < 1  # lower at the edges
    shares = torch.nn.functional.interpolate(masks[:, 2:], (64, 64), mode="bilinear")[..., :48, :48]
    shares = torch.nn.functional.interpolate(shares, (24, 24), mode="bilinear").sigmoid()
    assert third.score == pytest.approx(0.6 * shares.mean().item(), rel=1e-5) and third.box == (0, 0, 24, 24)
    assert len(network(torch.zeros(1, 3, 24, 24), 0.2)[0]) == 3  # .3 of a cat, too


def test_images_of_any_shape_are_seen_alone_or_together(detector: Path) -> None:
    images = pictures(3, 40, 60)
    network = Detector(str(detector), 48, CPU)
    together = network(images, 0.3)
    assert [len(of) for of in together] == [len(network(image[None], 0.3)[0]) for image in images]
    assert all(one.mask.shape == (40, 60) for of in together for one in of) and any(together)
    seen: list[Tensor] = []
    network._model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["pixel_values"]), with_kwargs=True
    )
    for shape in ((40, 60), (40, 200), (200, 40)):
        network(pictures(1, *shape), 0.3)
    # 48 x 72, padded to 64 x 96. Five times as long as high: 16 x 80, as the longest edge is 1333 / 800 of 48 at most.
    assert [tuple(one.shape[2:]) for one in seen] == [(64, 96), (32, 96), (96, 32)]
    assert seen[0][..., 48:, :].eq(0).all() and seen[0][..., 72:].eq(0).all() and seen[0][..., 47, 71].ne(0).all()
    assert seen[1][..., 16:, :].eq(0).all() and seen[1][..., 80:].eq(0).all() and seen[1][..., 15, 79].ne(0).all()
    assert network(images, 0.999) == [[], [], []]


def test_colours_are_asked_of_what_is_cut_out(clip: Path) -> None:
    image = pictures(1, 48, 64)[0]
    masks = [torch.zeros(48, 64, dtype=torch.bool) for _ in range(12)]
    for i, mask in enumerate(masks):
        mask[i : i + 20, 4 * i : 4 * i + 18] = True
        mask[i + 4 : i + 8, 4 * i + 3 : 4 * i + 9] = False
    objects = [Found("tv", 1.0, (4 * i, i, 4 * i + 18, i + 20), mask) for i, mask in enumerate(masks)]
    ask = Colours(str(clip), CPU)
    ours = ask(image, objects, "tv")

    picture, grey = to_pil(image[None])[0], Image.new("RGB", (64, 48), "#999")
    cuts = [Image.composite(picture, grey, Image.fromarray(one.mask.numpy())).crop(one.box) for one in objects]
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(cuts, return_tensors="pt")["pixel_values"]
    texts, unit = [], torch.nn.functional.normalize
    with torch.no_grad():
        for colour in COLOURS:
            tokens = [ask._tokenizer(one.format(colour, "tv"), return_tensors="pt") for one in TEMPLATES]
            each = [unit(ask._model.get_text_features(**one).pooler_output, dim=-1) for one in tokens]
            texts.append(unit(torch.cat(each).mean(0), dim=0))
        cosines = ask._model.get_image_features(pixel_values=pixels).pooler_output @ torch.stack(texts).T
    assert ours == [COLOURS[i] for i in cosines.argmax(-1)]
    assert len(set(ours)) > 1  # the picture matters
    assert TEMPLATES[1].format("red", "tv") == "a photo of a red-colored tv"


def test_images_are_judged_by_the_networks(detector: Path, clip: Path) -> None:
    images = pictures(3, 64, 64)
    settings: dict[str, Any] = {"detector": str(detector), "detector_size": 64, "colour_model": str(clip)}
    benchmark = GenEval(**settings, chunk_size=2)
    benchmark.prepare(CPU, torch.bfloat16)
    assert {weight.dtype for weight in benchmark._detector._model.parameters()} == {torch.float32}
    seen = benchmark._detector(images, 0.3)
    assert all(seen)
    labels = [of[0].label for of in seen]
    colours = [benchmark._colours(image, of[:1], of[0].label)[0] for image, of in zip(images, seen, strict=True)]
    absent = next(label for label in CLASSES if label not in {one.label for of in seen for one in of})
    rows = [
        {"tag": "colors", "include": [{"class": labels[0], "count": 1, "color": colours[0]}]},
        {"tag": "colors", "include": [{"class": labels[1], "count": 1, "color": colours[1]}]},
        {"tag": "single_object", "include": [{"class": absent, "count": 1}]},
    ]
    answers = benchmark.answers(images, rows)
    assert answers["reason"] == ["", "", f"expected {absent}>=1, found 0"]
    assert answers["correct"].tolist() == [1, 1, 0] and answers["correct"].dtype == torch.float32  # type: ignore[union-attr]
    backwards = GenEval(**settings, chunk_size=1)
    backwards.prepare(CPU, torch.float32)
    assert backwards.answers(images.flip(0), rows[::-1])["reason"] == list(answers["reason"])[::-1]


def test_checkpoints_that_do_not_fit_are_refused(detector: Path, clip: Path, tmp_path: Path) -> None:
    def refusal(**settings: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            GenEval(**{"detector": str(detector), "colour_model": str(clip)} | settings).prepare(CPU, torch.float32)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "detector nowhere is no folder; give one of a model of transformers" in refusal(detector="nowhere")
    assert "cannot be loaded as CLIPModel" in refusal(colour_model=str(tmp_path))
    build_detector(tmp_path, classes=81)
    assert "knows 81 classes; GenEval needs one of COCO's 80" in refusal(detector=str(tmp_path))
    model = build_detector(tmp_path)
    state = {name: value for name, value in model.state_dict().items() if name != "class_predictor.bias"}
    model.save_pretrained(tmp_path, state_dict=state)
    assert "1 missing (class_predictor.bias)" in refusal(detector=str(tmp_path))


def test_all_published_tags_are_known() -> None:
    assert set(TAGS) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
