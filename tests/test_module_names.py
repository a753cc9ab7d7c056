import pytest

from qwen3vl_train.modules import GROUPS, UNIONS, expand_groups


def test_unions_expand_to_their_groups_once_and_in_order():
    expanded = expand_groups(["text_attn", "vision", "vision_mlp"])
    assert expanded == ("vision_attn", "vision_mlp", "vision_embed", "text_attn")
    assert expand_groups(["all"]) == GROUPS
    assert expand_groups([]) == ()


def test_the_unions_of_the_towers_hold_no_merger():
    assert set(UNIONS["vision"]) | set(UNIONS["text"]) == set(GROUPS) - {"merger", "deepstack"}
    assert expand_groups(["merger"]) == ("merger",)


def test_an_unknown_group_names_near_ones():
    with pytest.raises(ValueError, match=r"'vison_attn' is not a module group; did you mean vision_attn"):
        expand_groups(["vison_attn"])
    with pytest.raises(ValueError, match=r"'projector' is not a module group; use vision_attn, .*, all$"):
        expand_groups(["projector"])
