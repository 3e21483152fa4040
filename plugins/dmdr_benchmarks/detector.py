"""What is in an image, and of which colour: the two networks behind GenEval."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr.errors import ConfigError
from dmdr.images import to_pil
from dmdr_benchmarks.loading import load, load_beside

# COCO's 80 classes in the order of detectors, three of them under the names of GenEval's prompts.
NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""
CLASSES = tuple(name.strip() for name in NAMES.split(","))
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")

ASPECT = 1333 / 800  # the longest edge of the detector's input may be so many times the wanted shortest
MULTIPLE = 32  # of the padded edges
LARGEST = 100  # pairs of query and class that are looked at
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
GREY = 0x99  # around an object


@dataclass(frozen=True)
class Found:
    """An object that a detector found.

    Attributes:
        label: Its class.
        score: In [0, 1].
        box: Left, top, right and bottom in pixels; the last two are exclusive.
        mask: [H, W] bool, true on the object.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor = field(repr=False, compare=False)


class Detector:
    """Mask2Former trained on COCO instances, read as the published detector is.

    A score is the probability of the class times the mean probability of the mask's pixels. Masks are brought to the
    size of the image before they are cut at 1/2; boxes are the masks' bounds.

    Source: Cheng et al. 2022, arXiv:2112.01527; sizes and the order of steps as in mmdetection 2.
    """

    def __init__(self, checkpoint: str, size: int, device: torch.device) -> None:
        """Load it.

        Args:
            checkpoint: A folder or hub id of a `Mask2FormerForUniversalSegmentation`.
            size: Shortest edge of its input, in pixels.
            device: Where it runs, in float32: thresholds were set for it.

        Raises:
            ConfigError: If it cannot be loaded, or does not tell COCO's 80 classes apart.
        """
        from transformers import Mask2FormerForUniversalSegmentation

        self._model = load(Mask2FormerForUniversalSegmentation, checkpoint, "detector", device, torch.float32)
        self._size = size
        if self._model.config.num_labels != len(CLASSES):
            raise ConfigError(
                f"detector {checkpoint} knows {self._model.config.num_labels} classes; "
                f"GenEval needs one of COCO's {len(CLASSES)} instance classes"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, least: float) -> list[list[Found]]:
        """What is found in each of B images, best first.

        Args:
            images: [B, 3, H, W] float32 in [0, 1].
            least: Scores are above it, in [0, 1).
        """
        height, width = images.shape[-2:]
        scale = self._size * min(1 / min(height, width), ASPECT / max(height, width))
        fitted = int(height * scale + 0.5), int(width * scale + 0.5)
        pixels = F.interpolate(images, fitted, mode="bilinear", align_corners=False)
        pixels = (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]
        pixels = F.pad(pixels, (0, -fitted[1] % MULTIPLE, 0, -fitted[0] % MULTIPLE))
        answer = self._model(pixel_values=pixels)
        found = []
        for classes, masks in zip(answer.class_queries_logits, answer.masks_queries_logits, strict=True):
            chances = classes.softmax(-1)[:, :-1].flatten()  # the last says that there is nothing
            chances, pairs = chances.topk(min(LARGEST, len(chances)))
            chances, pairs = chances[chances > least], pairs[chances > least]  # a mask can only lower a score
            labels = pairs % len(CLASSES)
            logits = _resized(masks[pairs // len(CLASSES)], tuple(pixels.shape[-2:]))
            logits = _resized(logits[:, : fitted[0], : fitted[1]], (height, width))
            inside = logits > 0
            sure = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
            scores = (chances * sure).tolist()
            objects = [
                Found(CLASSES[label], score, _bounds(mask), mask)
                for label, score, mask in zip(labels.tolist(), scores, inside, strict=True)
                if score > least
            ]
            found.append(sorted(objects, key=lambda one: -one.score))
        return found


class Colours:
    """Names the colour of objects with a CLIP model, zero-shot.

    A colour is three sentences about the class, as the mean of their unit embeddings. The object is cut out by its box,
    and what surrounds it there is grey.

    Source: Ghosh et al. 2023, arXiv:2310.11513, with CLIP ViT-L/14 of Radford et al. 2021, arXiv:2103.00020.
    """

    def __init__(self, checkpoint: str, device: torch.device) -> None:
        """Load it.

        Args:
            checkpoint: A folder or hub id of a `CLIPModel`, with its tokenizer and image processor.
            device: Where it runs, in float32.

        Raises:
            ConfigError: If it cannot be loaded.
        """
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self._model = load(CLIPModel, checkpoint, "colour_model", device, torch.float32)
        self._tokenizer = load_beside(AutoTokenizer, checkpoint, "colour_model")
        # Pillow, as in the published scorer
        self._processor = load_beside(AutoImageProcessor, checkpoint, "colour_model", backend="pil")
        self._device = device
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Tensor, found: Sequence[Found], label: str) -> list[str]:
        """The colour of each object of one class, of `COLOURS`.

        Args:
            image: [3, H, W] in [0, 1].
            found: Objects in it, at least one.
            label: Their class.
        """
        crops = []
        for one in found:
            left, top, right, bottom = (round(edge) for edge in one.box)
            cut = torch.where(one.mask, image, GREY / 255)[:, top:bottom, left:right]
            crops += to_pil(cut[None])
        pixels = self._processor(crops, return_tensors="pt")["pixel_values"].to(self._device)
        features = F.normalize(self._model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return [COLOURS[i] for i in (features @ self._texts(label).T).argmax(-1).tolist()]

    def _texts(self, label: str) -> Tensor:
        """Unit embeddings [10, D] of the colours of a class."""
        if label not in self._known:
            texts = [template.format(colour, label) for colour in COLOURS for template in TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._device)
            features = F.normalize(self._model.get_text_features(**tokens).pooler_output, dim=-1)
            self._known[label] = F.normalize(features.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)
        return self._known[label]


def _resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps [N, h, w] as [N, H, W]; N may be 0."""
    if not len(maps):  # which interpolation refuses
        return maps.new_empty(0, *size)
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _bounds(mask: Tensor) -> tuple[float, float, float, float]:
    """The box of a mask [H, W] with a true pixel."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
