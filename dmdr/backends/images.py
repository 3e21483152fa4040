"""What decoders have in common: their last step to images in [0, 1], and recomputation for a gradient."""

from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

# For its gradient, a function is run again in the backward pass; nothing here is random.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def to_unit_range(decoded: Tensor) -> Tensor:
    """VAE output [B, 3, H, W] in [-1, 1] -> float32 images in [0, 1]; the clamp passes gradients straight through.

    torch's own clamp has no gradient at and beyond its bounds, which would silence every saturated pixel.
    """
    image = decoded.float() / 2 + 0.5
    return image + (image.clamp(0, 1) - image).detach()
