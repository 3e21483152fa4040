"""ImageNet classes: DINOv2 with its linear classifier."""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr.errors import ConfigError, MissingFile
from dmdr.states import load_strict
from dmdr_rewards.checkpoint import Source, from_pretrained, image_processor, read_state, reason
from dmdr_rewards.network import ResizingReward, frozen
from dmdr_rewards.preprocess import IMAGENET_NORM, Preprocess

PUBLISHED = "facebook/dinov2-large-imagenet1k-1-layer"
VIT_L = {  # of its `config.json`
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 518,
    "num_labels": 1000,
}
SIZES = {"vits14": (384, 12), "vitb14": (768, 12), "vitl14": (1024, 24), "vitg14": (1536, 40)}  # width, depth
URL = "https://dl.fbaipublicfiles.com/dinov2"
EVALUATED = Preprocess(224, edge=256, mean=IMAGENET_NORM[0], std=IMAGENET_NORM[1])
OFFSET = 0.1  # by which the authors' code enlarges a grid of positions before it scales


@dataclass
class DINOv2(ResizingReward):
    """log p(label | image), at most 0, of a DINOv2 classifier; reads the column `label`, where None is not scored.

    At full size, with random weights, resize "float" moves a score by 2e-3 to 5e-3 from "exact", which is Pillow's,
    at 512 x 512, 768 x 512 and 512 x 768.

    Attributes:
        checkpoint: A folder or hub id of transformers' `Dinov2ForImageClassification`; a folder with the two files of
            torch.hub, `*_pretrain.pth` and `*_linear_head.pth` or `*_linear4_head.pth`; or `dinov2_vitl14_lc` (or vits,
            vitb, vitg), which fetches the first and the last of these as torch.hub does; None for the published
            one-layer ViT-L/14 of transformers.
        geometry: "squash" ignores the aspect ratio, as the paper does with its 256-pixel samples; "crop" is the
            published evaluation: shortest edge to 256, then the centre.

    Source: Oquab et al. 2023, arXiv:2304.07193, and github.com/facebookresearch/dinov2. Away from the size of
        pre-training, 518 pixels, transformers interpolates position embeddings by size, the authors' code by a factor
        with an offset of 0.1: each layout is scored as its own library does.
    """

    columns: ClassVar[tuple[str, ...]] = ("label",)
    reads_prompts = False
    geometry: Literal["squash", "crop"] = "squash"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.geometry not in ("squash", "crop"):
            raise ConfigError(f"geometry must be 'squash' or 'crop', not {self.geometry!r}")
        self._model: Classifier | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights; a ConfigError (ValueError) says what is wrong with the checkpoint."""
        meta = device.type == "meta"
        if match := re.fullmatch(r"dinov2_(vit[sblg]14)_lc", self.checkpoint or ""):
            folder = f"{URL}/dinov2_{match[1]}/dinov2_{match[1]}"
            if meta:
                width, depth = SIZES[match[1]]
                config = config_of(width, depth, gated=match[1] == "vitg14")
                model, preprocess = new_classifier(config, 5 * width, 1000, device), EVALUATED
            else:
                model, preprocess = of_torch_hub(_fetch(f"{folder}_pretrain.pth"), _fetch(f"{folder}_linear4_head.pth"))
        else:
            source = Source(self.checkpoint, PUBLISHED, device)
            backbone, head = (_hub_file(source, end) for end in ("_pretrain.pth", "_head.pth"))
            if backbone and head:
                model, preprocess = of_torch_hub(backbone, head, meta=meta)
            elif backbone or head:
                raise ConfigError(f"{source.name} holds only one of the two files *_pretrain.pth and *_head.pth")
            else:
                model, preprocess = of_transformers(source)
        self._model = model
        frozen(model, device, dtype)
        self._dtype = dtype
        squashed = Preprocess(preprocess.size, "squash", mean=preprocess.mean, std=preprocess.std)
        self._preprocess = squashed if self.geometry == "squash" else preprocess

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1], prompts (unused) and the column `label` -> [B] float32, NaN where the label is None.

        Raises:
            ValueError: If the column is missing, or a label is not one of the classifier's.
        """
        if self._model is None:
            raise RuntimeError("DINOv2 has no weights yet; call prepare(device, dtype) first")
        labels = self._labels(columns.get("label"), len(images)).to(images.device)
        logits = self.look(self._logits, self._preprocess(images, self.method))
        scores = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1)
        return scores.masked_fill(labels < 0, float("nan"))

    def _logits(self, pixels: Tensor) -> Tensor:
        assert self._model
        return self._model(pixels.to(self._dtype))

    def _labels(self, column: Sequence[Any] | None, count: int) -> Tensor:
        """[B] int64, -1 for None; checked here: on a GPU a class that does not exist would end the process."""
        assert self._model
        if column is None:
            raise ValueError("the prompts have no column 'label' (the class of each image, an integer)")
        classes = self._model.head.out_features
        try:
            labels = [None if label is None else operator.index(label) for label in column]
        except TypeError as error:
            raise ValueError(f"the column 'label' is not all integers: {error}") from error
        if wrong := [label for label in labels if label is not None and not 0 <= label < classes]:
            raise ValueError(f"the label {wrong[0]} must be between 0 and {classes - 1}")
        return torch.tensor([-1 if label is None else label for label in labels]).reshape(count)


class Classifier(nn.Module):
    """A linear layer on the class tokens of the backbone's last blocks and the mean patch token of the last."""

    def __init__(self, backbone: Any, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.blocks = head.in_features // backbone.config.hidden_size - 1

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size] -> logits [B, classes]."""
        hidden = self.backbone(pixels, output_hidden_states=True).hidden_states[-self.blocks :]
        normed = [self.backbone.layernorm(state) for state in hidden]
        return self.head(torch.cat([*(state[:, 0] for state in normed), normed[-1][:, 1:].mean(1)], 1))


def of_transformers(source: Source) -> tuple[Classifier, Preprocess]:
    """The one-layer classifier of a `Dinov2ForImageClassification`."""
    from transformers import Dinov2ForImageClassification

    model = from_pretrained(Dinov2ForImageClassification, source, VIT_L)
    # The published network was pre-trained at 518 pixels, which is what its config says, and is evaluated at 224.
    size = model.config.image_size
    defaults = (
        EVALUATED
        if size == 518
        else Preprocess(size, "shortest", size * 8 // 7, "round", EVALUATED.mean, EVALUATED.std)
    )
    preprocess = Preprocess.of_processor(image_processor(source), defaults, source.name)
    return Classifier(model.dinov2, model.classifier), preprocess


def of_torch_hub(backbone: Path, head: Path, *, meta: bool = False) -> tuple[Classifier, Preprocess]:
    """The classifier of the authors' two files, at 224 pixels; `meta` as in `read_state`.

    Raises:
        ConfigError: If a file cannot be read, or is of another architecture.
    """
    given, linear = (read_state(path, meta=meta) for path in (backbone, head))
    what = f"checkpoint {backbone}"
    try:
        width, patch = given["pos_embed"].shape[-1], given["patch_embed.proj.weight"].shape[-1]
        depth = 1 + max(int(match[1]) for name in given if (match := re.match(r"blocks\.(\d+)\.", name)))
        gated = "blocks.0.mlp.w12.weight" in given
        ratio = 4 if gated else given["blocks.0.mlp.fc1.weight"].shape[0] // width
        config = config_of(width, depth, ratio=ratio, gated=gated, patch=patch)
        state = _renamed({**given, "pos_embed": positions(given["pos_embed"], EVALUATED.size // patch)})
        classes, inputs = linear["weight"].shape
        classifier = new_classifier(config, inputs, classes, given["pos_embed"].device)
    except Exception as error:  # whatever odd shapes lead to
        raise ConfigError(f"{what} and {head.name} are no DINOv2 classifier of torch.hub ({reason(error)})") from error
    load_strict(classifier.backbone.state_dict(), state, what)
    if inputs not in (2 * width, 5 * width):
        raise ConfigError(
            f"checkpoint {head} takes {inputs} features; a backbone of width {width} gives {2 * width} or {5 * width}"
        )
    load_strict(classifier.head.state_dict(), linear, f"checkpoint {head}")
    return classifier, EVALUATED


def config_of(width: int, depth: int, *, ratio: int = 4, gated: bool = False, patch: int = 14) -> Any:
    """The authors' backbone as a `Dinov2Config`, at 224 pixels."""
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        mlp_ratio=ratio,
        use_swiglu_ffn=gated,
        patch_size=patch,
        image_size=EVALUATED.size,
    )


def new_classifier(config: Any, inputs: int, classes: int, device: torch.device) -> Classifier:
    """A classifier on a `Dinov2Config`, without what it learnt."""
    from transformers import Dinov2Model

    with device:
        return Classifier(Dinov2Model(config), nn.Linear(inputs, classes))


def positions(embeddings: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + n * n, D] for a grid of `side` x `side`, interpolated as the authors' code does."""
    grid = int((embeddings.shape[1] - 1) ** 0.5)
    if grid == side:
        return embeddings
    patches = embeddings[:, 1:].float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    factor = (side + OFFSET) / grid
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([embeddings[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _renamed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names as those of transformers' `Dinov2Model`."""
    renamed = {
        r"^(cls_token|mask_token)$": r"embeddings.\1",
        r"^pos_embed$": "embeddings.position_embeddings",
        r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
        r"^norm\.": "layernorm.",
        r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.o_proj.",
        r"^blocks\.(\d+)\.ls([12])\.gamma$": r"encoder.layer.\1.layer_scale\2.lambda1",
        r"^blocks\.(\d+)\.mlp\.w3\.": r"encoder.layer.\1.mlp.down_proj.",
        r"^blocks\.": "encoder.layer.",
    }
    state: dict[str, Tensor] = {}
    for name, value in given.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
            for role, part in zip("qkv", value.chunk(3), strict=True):
                state[f"encoder.layer.{match[1]}.attention.{role}_proj.{match[2]}"] = part
            continue
        if match := re.fullmatch(r"blocks\.(\d+)\.mlp\.w12\.(\w+)", name):  # ViT-g
            for role, part in zip(("gate", "up"), value.chunk(2), strict=True):
                state[f"encoder.layer.{match[1]}.mlp.{role}_proj.{match[2]}"] = part
            continue
        for pattern, replacement in renamed.items():
            new, hits = re.subn(pattern, replacement, name)
            if hits:
                name = new
                break
        state[name] = value
    return state


def _hub_file(source: Source, end: str) -> Path | None:
    """A file of torch.hub's layout in a local folder."""
    found = sorted(source.folder.glob(f"*{end}")) if source.folder else []
    if len(found) > 1:
        raise ConfigError(f"{source.name} holds {', '.join(path.name for path in found)}; keep only one")
    return found[0] if found else None


def _fetch(url: str) -> Path:
    """A published file, in the cache of torch.hub."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except Exception as error:
            what = f"{url}, one of the two files in the folder of a checkpoint, cannot be fetched ({reason(error)})"
            raise MissingFile(what, "checkpoint") from error
    return path
