"""Rotary embeddings against the stock modules, whose own numbers come from config.json."""

import torch

from qwen3vl_train.model.rope import apply_rope, mrope_cos_sin, vision_angles


def test_mrope_equals_transformers_on_three_different_axes(ours, stock):
    positions = torch.randint(0, 4000, (3, 50), generator=torch.Generator().manual_seed(0))
    text = ours.arch.text
    cos, sin = mrope_cos_sin(positions, text.head_dim, text.rope_theta, text.mrope_section)
    theirs = stock.model.language_model.rotary_emb(torch.zeros(1, 50, 1), positions[:, None])
    # One ulp of an angle of 4000 is 2.4e-4.
    torch.testing.assert_close(cos, theirs[0][0], atol=3e-4, rtol=0)
    torch.testing.assert_close(sin, theirs[1][0], atol=3e-4, rtol=0)
    assert cos.dtype == torch.float32


def test_axes_of_the_released_sizes_interleave_and_end_in_time():
    # With 128 wide heads and sections 24, 20, 20: which axis turns each of the 64 frequencies.
    axes = ""
    for frequency in range(64):
        moved = [
            bool(mrope_cos_sin(torch.eye(3, dtype=torch.int64)[:, [axis]], 128, 5e6, (24, 20, 20))[1][0, frequency])
            for axis in range(3)
        ]
        assert sum(moved) == 1, frequency
        axes += "THW"[moved.index(True)]
    assert axes == "THW" * 20 + "TTTT"


def test_vision_angles_equal_transformers(ours, stock):
    tower = ours.visual.vision
    grids = torch.tensor([[1, 6, 10], [2, 4, 4]])
    angles = tower.rot_pos_emb(grids)
    index = tower.index(grids)
    cos, sin = stock.model.visual.rotary_pos_emb(torch.zeros(1), index.patch_hw.long())[:2]
    twice = torch.cat((angles, angles), dim=-1)
    assert twice.shape == (92, ours.arch.vision.head_dim)
    torch.testing.assert_close(twice.cos(), cos.reshape(twice.shape), atol=1e-6, rtol=0)
    torch.testing.assert_close(twice.sin(), sin.reshape(twice.shape), atol=1e-6, rtol=0)


def test_row_frequencies_come_before_column_frequencies():
    angles = vision_angles(torch.tensor([[3, 0], [0, 5]]), head_dim=16)
    assert angles.shape == (2, 8)
    assert (angles[0, :4] > 0).all()
    assert (angles[0, 4:] == 0).all()
    assert (angles[1, :4] == 0).all()
    torch.testing.assert_close(angles[1, 4:], 5 / 10000 ** (torch.arange(0, 8, 2) / 8))


def test_rotation_keeps_the_norm_and_the_dtype():
    x_TNH = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = mrope_cos_sin(torch.arange(5).expand(3, -1), 8, 1e4, (2, 1, 1))
    torch.testing.assert_close(apply_rope(x_TNH, cos, sin).norm(dim=-1), x_TNH.norm(dim=-1))
    assert torch.equal(apply_rope(x_TNH, cos, sin)[0], x_TNH[0])
    assert apply_rope(x_TNH.bfloat16(), cos, sin).dtype == torch.bfloat16
