"""The vision tower.

P patches, C vision hidden, N heads, H head dim, M merged rows (P / 4), D text hidden, F attention segments.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_train.arch import VisionArch
from qwen3vl_train.batch import VisionIndex, vision_index
from qwen3vl_train.model.activation_checkpointing import Checkpointing, run_block
from qwen3vl_train.model.attention import Attention, PackedAttention
from qwen3vl_train.model.rope import Rope, apply_rope, vision_angles


class VisionOutput(NamedTuple):
    """Patches (P, C) in merge-block order; merged rows (M, D) in token order; (M, D) of each tapped block, in order."""

    last_hidden_state: Tensor
    pooler_output: Tensor
    deepstack_features: list[Tensor]


class Qwen3VLVisionPatchEmbed(nn.Module):
    """Embed patches. The stored Conv3d weight is applied as one matrix product: its kernel equals its stride."""

    def __init__(self, arch: VisionArch) -> None:
        super().__init__()
        kernel = (arch.temporal_patch_size, arch.patch_size, arch.patch_size)
        self.proj = nn.Conv3d(arch.in_channels, arch.hidden_size, kernel_size=kernel, stride=kernel, bias=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the embedded patches, (P, C).

        inputs: (P, 1536) flattened patches; (P, 768) patches of stills, whose one frame is taken twice; (N, C, H, W)
            images of one patch each or larger, in raster order; (N, C, T, H, W) clips likewise.

        uint8 is normalised here, as (x - 127.5) / 127.5; floating-point input is taken as already normalised. Raises
        ValueError for any other shape or a size that is not a multiple of the patch size.
        """
        channels = self.proj.in_channels
        if inputs.dim() == 4:  # a still repeats its frame along time
            inputs = inputs.unsqueeze(2).expand(-1, -1, self.proj.kernel_size[0], -1, -1)
        if inputs.dim() == 5:
            inputs = self._flatten(inputs)
        weight = self.proj.weight
        still_dim = channels * weight[0, 0, 0].numel()
        if inputs.dim() != 2 or inputs.shape[1] not in (still_dim, still_dim * weight.shape[2]):
            raise ValueError(
                f"patch_embed: got shape {tuple(inputs.shape)}; give (P, {still_dim * weight.shape[2]}), "
                f"(P, {still_dim}), (N, {channels}, H, W) or (N, {channels}, T, H, W)"
            )
        if inputs.dtype == torch.uint8:
            inputs = (inputs.float() - 127.5) / 127.5
        if inputs.shape[1] == still_dim:
            # Both frames of a still are the same, so their two kernels act as their sum; summed in float32.
            weight = weight.float().sum(dim=2).to(weight.dtype)
        return F.linear(inputs.to(weight.dtype), weight.flatten(1), self.proj.bias)

    def _flatten(self, inputs: Tensor) -> Tensor:
        """Cut (N, C, T, H, W) into (patches, 1536), frame pair by frame pair, row by row."""
        t, h, w = self.proj.kernel_size
        num, channels, frames, height, width = inputs.shape
        if channels != self.proj.in_channels or frames % t or height % h or width % w:
            raise ValueError(f"patch_embed: got shape {tuple(inputs.shape)}; sizes must be multiples of {(t, h, w)}")
        blocks = inputs.reshape(num, channels, frames // t, t, height // h, h, width // w, w)
        return blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, channels * t * h * w)


class Qwen3VLVisionAttention(nn.Module):
    def __init__(self, arch: VisionArch, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, arch.num_heads
        self.qkv = nn.Linear(arch.hidden_size, 3 * arch.hidden_size, bias=True)
        self.proj = nn.Linear(arch.hidden_size, arch.hidden_size, bias=True)

    def forward(self, x_PC: Tensor, rope: Rope, attention: Attention) -> Tensor:
        q_PNH, k_PNH, v_PNH = self.qkv(x_PC).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out_PNH = attention.attend(self.layer, apply_rope(q_PNH, *rope), apply_rope(k_PNH, *rope), v_PNH)
        return self.proj(out_PNH.flatten(1))


class Qwen3VLVisionMLP(nn.Module):
    def __init__(self, arch: VisionArch) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=True)
        self.linear_fc2 = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=True)

    def forward(self, x_PC: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x_PC), approximate="tanh"))


class Qwen3VLVisionBlock(nn.Module):
    """One block. Its activation checkpointing, set from outside, runs inside of it, so that sharding may wrap it."""

    def __init__(self, arch: VisionArch, layer: int) -> None:
        super().__init__()
        self.checkpointing: Checkpointing = "none"
        self.norm1 = nn.LayerNorm(arch.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(arch.hidden_size, eps=1e-6)
        self.attn = Qwen3VLVisionAttention(arch, layer)
        self.mlp = Qwen3VLVisionMLP(arch)

    def forward(self, x_PC: Tensor, rope: Rope, attention: Attention) -> Tensor:
        return run_block(self.checkpointing, self._forward, x_PC, rope, attention)

    def _forward(self, x_PC: Tensor, rope: Rope, attention: Attention) -> Tensor:
        x_PC = x_PC + self.attn(self.norm1(x_PC), rope, attention)
        return x_PC + self.mlp(self.norm2(x_PC))


class Qwen3VLVisionPatchMerger(nn.Module):
    """Join 2 x 2 neighbouring patches (4 successive rows) and project them to the text width.

    The main merger normalises each patch before the join, the DeepStack mergers the joined row. GELU is exact (erf).
    """

    def __init__(self, arch: VisionArch, *, norm_after_join: bool) -> None:
        super().__init__()
        self.joined = arch.merged_size
        self.norm = nn.LayerNorm(self.joined if norm_after_join else arch.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.joined, self.joined, bias=True)
        self.linear_fc2 = nn.Linear(self.joined, arch.out_hidden_size, bias=True)

    def forward(self, x_PC: Tensor) -> Tensor:
        x_MJ = self.norm(x_PC.view(-1, *self.norm.normalized_shape)).view(-1, self.joined)
        return self.linear_fc2(F.gelu(self.linear_fc1(x_MJ)))


class Qwen3VLVisionModel(nn.Module):
    """The tower over all images and clips of a pack at once; see `VisionOutput`."""

    def __init__(self, arch: VisionArch) -> None:
        super().__init__()
        self.arch = arch
        self.patch_embed = Qwen3VLVisionPatchEmbed(arch)
        self.pos_embed = nn.Embedding(arch.num_position_embeddings, arch.hidden_size)
        self.blocks = nn.ModuleList([Qwen3VLVisionBlock(arch, layer) for layer in range(arch.depth)])
        self.merger = Qwen3VLVisionPatchMerger(arch, norm_after_join=False)
        self.deepstack_merger_list = nn.ModuleList(
            [Qwen3VLVisionPatchMerger(arch, norm_after_join=True) for _ in arch.deepstack_visual_indexes]
        )

    def index(self, grid_thw: Tensor) -> VisionIndex:
        """Return what the tower needs of grid_thw (N, 3), which is read on the host. Packs carry theirs."""
        grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
        index = vision_index(grids, side=self.arch.position_table_side, merge=self.arch.spatial_merge_size)
        return index.to(self.pos_embed.weight.device)

    def fast_pos_embed_interpolate(self, grid_thw: Tensor) -> Tensor:
        """Return the learned positions (P, C) of every patch, in merge-block order and the same for every frame."""
        return self._interpolate(self.index(grid_thw))

    def _interpolate(self, index: VisionIndex) -> Tensor:
        # Bilinear. Weights and sum are float32, as in transformers 5; the result has the dtype of the table.
        table = self.pos_embed.weight
        corners = zip(index.corner_index, index.corner_weight, strict=True)
        total = sum(F.embedding(corner, table) * weight[:, None] for corner, weight in corners)
        assert isinstance(total, Tensor)
        return total.to(table.dtype)

    def rot_pos_emb(self, grid_thw: Tensor) -> Tensor:
        """Return rotation angles (P, H/2) float32: frequencies of the row, then of the column, in merge-block order."""
        return vision_angles(self.index(grid_thw).patch_hw, self.arch.head_dim)

    def tower_parameters(self) -> list[nn.Parameter]:
        """Return the parameters below the mergers."""
        return [*self.patch_embed.parameters(), *self.pos_embed.parameters(), *self.blocks.parameters()]

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, index: VisionIndex | None = None) -> VisionOutput:
        """Encode the patches (see Qwen3VLVisionPatchEmbed) of the media in grid_thw (N, 3).

        index: what the collator computed from the grids; without it they are read back from grid_thw.
        """
        index = index or self.index(grid_thw)
        # Where nothing below the mergers trains, that part runs without a graph.
        tower_trains = any(parameter.requires_grad for parameter in self.tower_parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and tower_trains):
            x_PC = self.patch_embed(pixel_values)
            if x_PC.shape[0] != index.patch_hw.shape[0]:
                raise ValueError(f"vision: {x_PC.shape[0]} patches, but grid_thw counts {index.patch_hw.shape[0]}")
            x_PC = x_PC + self._interpolate(index)
            angles = vision_angles(index.patch_hw, self.arch.head_dim).repeat(1, 2)
            rope = (angles.cos(), angles.sin())
            attention = PackedAttention(index.segments, causal=False)  # inside each frame, in both directions
            tapped: dict[int, Tensor] = {}
            for number, block in enumerate(self.blocks):
                x_PC = block(x_PC, rope, attention)
                if number in self.arch.deepstack_visual_indexes:
                    tapped[number] = x_PC
        mergers = zip(self.deepstack_merger_list, self.arch.deepstack_visual_indexes, strict=True)
        return VisionOutput(x_PC, self.merger(x_PC), [merger(tapped[number]) for merger, number in mergers])
