"""The head of DiNa-LRM: a score of what an SD3 transformer computes inside. Names of weights are the published ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Modulated(nn.Module):
    """The tokens of one layer, scaled and shifted by the time."""

    def __init__(self, tokens: int, width: int, out: int, *, project: bool) -> None:
        super().__init__()
        self.proj_in = nn.Linear(tokens, width) if project or tokens != width else nn.Identity()
        self.layer_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.cond_mlp = nn.Sequential(nn.Linear(tokens, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.proj = nn.Linear(width, out)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Tokens [B, N, C] and the time's embedding [B, C] -> [B, N, out]."""
        scale, shift = self.cond_mlp(time).unsqueeze(1).chunk(2, dim=-1)
        out: Tensor = self.proj(self.proj_in(tokens) * (1 + scale) + shift + self.layer_embed)
        return out


class Looking(nn.Module):
    """Attention of queries to image tokens and to text tokens, each by itself; `gated` weighs the values of tokens."""

    def __init__(self, width: int, heads: int, *, text: bool, gated: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_v = nn.RMSNorm(width), nn.RMSNorm(width)
        self.to_q, self.to_k_vis, self.to_v_vis = (nn.Linear(width, width) for _ in range(3))
        if text:
            self.norm_t = nn.RMSNorm(width)
            self.to_k_text, self.to_v_text = (nn.Linear(width, width) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())  # where the published one has a dropout
        if gated:
            self.gate_vis = _gate(width)
            if text:
                self.gate_text = _gate(width)

    def forward(self, queries: Tensor, image: Tensor, text: Tensor | None = None) -> Tensor:
        """Queries [B, Q, W] after looking at image tokens [B, N, W] and text tokens [B, T, W]."""
        q = self.to_q(self.norm_q(queries))
        seen = self._look(q, self.norm_v(image), "vis")
        if text is not None:
            seen = seen + self._look(q, self.norm_t(text), "text")
        out: Tensor = queries + self.to_out(seen)
        return out

    def _look(self, q: Tensor, tokens: Tensor, kind: str) -> Tensor:
        k, v = getattr(self, f"to_k_{kind}")(tokens), getattr(self, f"to_v_{kind}")(tokens)
        if hasattr(self, f"gate_{kind}"):
            v = v * getattr(self, f"gate_{kind}")(tokens).sigmoid()
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _gate(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))


class Head(nn.Module):
    """Some queries look at the tokens of some layers; the score is the mean of what they then say.

    Args:
        tokens: Width of the transformer.
        width: Of the head.
        image_layers, text_layers: How many layers of image and of text tokens it is given.
        queries, heads: How many queries, and attention heads.
        project: Whether tokens go through a layer of their own even where they have the head's width.
    """

    def __init__(
        self, tokens: int, width: int, image_layers: int, text_layers: int, queries: int, heads: int, *, project: bool
    ) -> None:
        super().__init__()
        part = width // 4
        self.layer_adapters_visual, self.layer_adapters_text = (
            nn.ModuleList([Modulated(tokens, width, part, project=project) for _ in range(count)])
            for count in (image_layers, text_layers)
        )
        self.agg_visual = nn.Linear(image_layers * part, width)
        if text_layers:
            self.agg_text = nn.Linear(text_layers * part, width)
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, width))
        self.attn1 = Looking(width, heads, text=text_layers > 0, gated=True)
        self.attn2 = Looking(width, heads, text=False, gated=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 1)

    def forward(self, image: Sequence[Tensor], text: Sequence[Tensor], time: Tensor) -> Tensor:
        """Tokens of the layers, [B, N, C] and [B, T, C] each, and the time's embedding [B, C] -> scores [B]."""
        seen = self.agg_visual(_joined(self.layer_adapters_visual, image, time))
        read = self.agg_text(_joined(self.layer_adapters_text, text, time)) if text else None
        queries = self.attn1(self.query_tokens.expand(len(time), -1, -1), seen, read)
        queries = self.attn2(queries, seen)
        queries = queries + self.ff(self.norm_ff(queries))
        score: Tensor = self.head(queries).mean(1)[:, 0]
        return score


def _joined(layers: nn.ModuleList, tokens: Sequence[Tensor], time: Tensor) -> Tensor:
    return torch.cat([layer(each, time) for layer, each in zip(layers, tokens, strict=True)], dim=-1)
