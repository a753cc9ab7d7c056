"""Rotary position embeddings of both towers. H head dim, T tokens, P patches; cos and sin are computed in float32.

Reference: Su et al., "RoFormer" (2021); Qwen3-VL's interleaved M-RoPE as in `Qwen3VLTextRotaryEmbedding` of
transformers.
"""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos and sin, (T, H) each


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Return theta ** -(0, 2, .. dim-2)/dim, (dim/2,) float32. Never stored, so never cast to bfloat16."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate each head of each token, in the wider of the two dtypes, and return the dtype of x."""
    rotated = x_TNH * cos_TH[:, None] + rotate_half(x_TNH) * sin_TH[:, None]
    return rotated.to(x_TNH.dtype)


def vision_angles(patch_hw_P2: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Return angles (P, H/2) float32: H/4 frequencies of the row, then H/4 of the column."""
    inv_freq = inverse_frequencies(head_dim // 2, theta, patch_hw_P2.device)
    return (patch_hw_P2[..., None].float() * inv_freq).flatten(1)


def mrope_cos_sin(positions_3T: Tensor, head_dim: int, theta: float, section: tuple[int, int, int]) -> Rope:
    """Return cos and sin, (T, H) float32, of interleaved M-RoPE.

    Frequency j rotates with the height where j % 3 == 1 and j < 3*section[1], with the width where j % 3 == 2 and
    j < 3*section[2], with time elsewhere: T H W T H W ... T T T T for (24, 20, 20).
    """
    inv_freq = inverse_frequencies(head_dim, theta, positions_3T.device)
    index = torch.arange(head_dim // 2, device=positions_3T.device)
    is_height = (index % 3 == 1) & (index < 3 * section[1])
    is_width = (index % 3 == 2) & (index < 3 * section[2])
    time, height, width = (positions_3T.float()[:, :, None] * inv_freq).unbind()
    angles = torch.where(is_height, height, torch.where(is_width, width, time))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
