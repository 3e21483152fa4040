"""Human preference: ImageReward."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmdr.errors import ConfigError
from dmdr.states import load_strict
from dmdr_rewards.checkpoint import Source, read_json, read_state, reason, tokenizer_of
from dmdr_rewards.network import HEAD_WIDTHS, ResizingReward, at_least_float32, frozen, new_head, score_head
from dmdr_rewards.preprocess import Preprocess

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores of the authors' training data
BERT = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens of a prompt
HEAD_WIDTH = 64  # of the vision transformer, whose file does not say how many heads it has
UNUSED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")
VISION = {  # of the published weights
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 224,
    "patch_size": 16,
}
TEXT = {  # of the published `med_config.json`
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
NAMES = {  # of transformers, and the authors'
    r"vision\.embeddings\.class_embedding": r"blip.visual_encoder.cls_token",
    r"vision\.embeddings\.position_embedding": r"blip.visual_encoder.pos_embed",
    r"vision\.embeddings\.patch_embedding\.(.*)": r"blip.visual_encoder.patch_embed.proj.\1",
    r"vision\.encoder\.layers\.(\d+)\.layer_norm([12])\.(.*)": r"blip.visual_encoder.blocks.\1.norm\2.\3",
    r"vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.(.*)": r"blip.visual_encoder.blocks.\1.attn.qkv.\2",
    r"vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.(.*)": r"blip.visual_encoder.blocks.\1.attn.proj.\2",
    r"vision\.encoder\.layers\.(\d+)\.mlp\.(.*)": r"blip.visual_encoder.blocks.\1.mlp.\2",
    r"vision\.post_layernorm\.(.*)": r"blip.visual_encoder.norm.\1",
    r"text\.(.*)": r"blip.text_encoder.\1",
    r"head\.(.*)": r"mlp.layers.\1",
}


@dataclass
class ImageReward(ResizingReward):
    """ImageReward v1.0: a BLIP that reads the prompt while it looks at the image, tuned on human choices.

    Standardised over the authors' data: about -2.5 to 2. The shortest edge of an image is brought to 224 and the
    centre cropped; a prompt is cut after 35 tokens. There are no separable text features. In bfloat16 a score is off
    by about 0.01: compare models in float32.

    At full size, with random weights, resize "float" moves a score by up to 1e-3 from "exact", which is Pillow's,
    at 512 x 512, 768 x 512 and 512 x 768.

    Attributes:
        checkpoint: The weights file (`ImageReward.pt`), `org/name:file` on the hub, or a folder with it, its
            `med_config.json` and, where it has them, the files of the tokenizer; None for the published one.
        tokenizer: Folder or hub id of the tokenizer; None for that of the checkpoint's folder, or where it has none
            BERT's.

    Source: Xu et al. 2023, arXiv:2304.05977, and github.com/THUDM/ImageReward, whose weights are loaded into the BLIP
        of transformers; the scores are those of the authors' package.
    """

    tokenizer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._model: Network | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights; a ConfigError (ValueError) says what is wrong with the checkpoint."""
        source = Source(self.checkpoint, "THUDM/ImageReward", device)
        if source.known:
            model = new_network(VISION, {}, new_head(HEAD_WIDTHS, device), device)
        else:
            path = source.file or source.require("ImageReward.pt")
            config = None if source.file else source.find("med_config.json")
            state = read_state(path, meta=source.meta)
            model = network_of(state, read_json(config) if config else {}, f"checkpoint {path}")
        own = not self.tokenizer and source.file is None and source.find("tokenizer.json", "vocab.txt")
        words = source if own else Source(self.tokenizer, BERT, device, "tokenizer")
        self._tokenizer = tokenizer_of(words, model.text.config.vocab_size)
        frozen(model, device, dtype)
        model.head.to(torch.promote_types(dtype, torch.float32))
        self._model, self._dtype = model, dtype
        self._preprocess = Preprocess(model.size)

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1] and B prompts -> [B] float32."""
        if self._model is None:
            raise RuntimeError("ImageReward has no weights yet; call prepare(device, dtype) first")
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(images.device)
        pixels = self._preprocess(images, self.method)
        return self.look(self._score, pixels, tokens.input_ids, tokens.attention_mask)

    def _score(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert self._model
        return self._model(pixels.to(self._dtype), input_ids, attention_mask)


class Network(nn.Module):
    """Vision transformer, text transformer with cross-attention to its patches, head on the first token."""

    def __init__(self, vision: Any, text: Any, head: nn.Sequential) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.size: int = vision.config.image_size

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, 3, size, size], [B, 35], [B, 35] -> standardised scores [B]."""
        # Not the pooled output, which is normalised twice.
        patches = self.vision(pixels).last_hidden_state
        # transformers would ask a mask whether it leaves out any token, which one on the meta device cannot tell.
        mask = None if attention_mask.is_meta else attention_mask
        read = self.text(input_ids=input_ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (self.head(at_least_float32(read[:, 0])).squeeze(-1) - MEAN) / STD


def network_of(given: Mapping[str, Tensor], med_config: Mapping[str, Any], what: str) -> Network:
    """The network of a flat state dict in the published layout; the vision transformer's sizes are read off the shapes.

    Args:
        given: Tensors by the authors' names.
        med_config: Settings of the text transformer; the published ones where it is silent.
        what: Where from, for messages.

    Returns:
        The network, on the device of the state dict.

    Raises:
        ConfigError: If a weight is missing, unexpected or of another shape.
    """
    given = {name: value for name, value in given.items() if not name.startswith(UNUSED)}
    head = score_head({name: given[name] for name in given if name.startswith("mlp.layers.")}, "mlp.layers", what)
    try:
        patch_weight = given["blip.visual_encoder.patch_embed.proj.weight"]
        width, patch = patch_weight.shape[0], patch_weight.shape[-1]
        tokens = given["blip.visual_encoder.pos_embed"].shape[1] - 1
        vision = {
            "hidden_size": width,
            "intermediate_size": given["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": 1
            + max(int(m[1]) for n in given if (m := re.match(r"blip\.visual_encoder\.blocks\.(\d+)\.", n))),
            "image_size": round(tokens**0.5) * patch,
            "patch_size": patch,
        }
        network = new_network(vision, med_config, head, patch_weight.device)
    except Exception as error:  # whatever odd shapes or settings lead to
        raise ConfigError(f"{what} is no ImageReward ({reason(error)})") from error
    load_strict({_published(name): value for name, value in network.state_dict().items()}, given, what)
    return network


def new_network(
    vision: Mapping[str, Any], med_config: Mapping[str, Any], head: nn.Sequential, device: torch.device
) -> Network:
    """The network of these sizes, without what it learnt; `med_config` as in `network_of`."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    width = vision["hidden_size"]
    heads = max(1, width // HEAD_WIDTH)
    vision_config = BlipVisionConfig(**vision, num_attention_heads=heads, layer_norm_eps=1e-6)
    known = {key: med_config.get(key, value) for key, value in TEXT.items()}
    # is_decoder: cross-attention.
    text_config = BlipTextConfig(**known, encoder_hidden_size=width, is_decoder=True, bos_token_id=None)
    with device:
        return Network(BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False), head)


def _published(name: str) -> str:
    """The authors' name of a weight of `Network`."""
    for pattern, theirs in NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(theirs)
    return name
