"""Clips through our data path and model, and through stock transformers: ids, pixels, positions, logits, loss."""

from fractions import Fraction
from itertools import groupby

import pytest
import torch

from qwen3vl_train import MultimodalCollator
from qwen3vl_train.batch import IGNORE_LABEL
from qwen3vl_train.model.hf_names import to_huggingface
from tests.helpers import clip_files, oracles
from tests.helpers.clip_files import write_clip

# Noise of float32 is 1e-5; one time index that runs on inside the clip moves the logits by 3, attention over the whole
# clip by 2 (see the reasons beside the tolerances of test_against_transformers.py).
LOGITS = 2e-4
LOSS = 1e-5
GRADIENT = 1e-4
MARKUPS = ["bare", "wrapped"]


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Paths of clips: 24 frames at 12 a second, an odd number of sampled frames, a rate of 29.97, one large enough to
    be shrunk and one small enough to grow."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        "plain": str(write_clip(folder / "plain.mp4", 24)),
        "odd": str(write_clip(folder / "odd.mkv", 31, size=(80, 96))),
        "ntsc": str(write_clip(folder / "ntsc.mp4", 90, size=(64, 64), rate=Fraction(30000, 1001))),
        "large": str(write_clip(folder / "large.mp4", 30, size=(480, 270))),
        "small": str(write_clip(folder / "small.mp4", 3, size=(30, 20))),
    }


def conversations(clips) -> dict[str, list]:
    def clip(name):
        return {"type": "video", "video": clips[name]}

    def ask(*content):
        return [{"role": "user", "content": [*content]}, {"role": "assistant", "content": "It moves to the left."}]

    text = {"type": "text", "text": "What happens here? <0.3 seconds>"}
    image = {"type": "image", "image": oracles.sample_images()["wide"]}
    return {
        "plain": ask(clip("plain"), text),
        "text before": ask(text, clip("odd")),
        "ntsc": ask(clip("ntsc"), text),
        "two clips": ask(clip("large"), clip("small"), text),
        "clip and picture": ask(image, text, clip("odd"), image, text),
        "two turns": [*ask(clip("small"), text), *ask(text, clip("plain"))],
    }


KINDS = ["plain", "text before", "ntsc", "two clips", "clip and picture", "two turns"]


@pytest.fixture(scope="session", params=MARKUPS)
def markup(request):
    return request.param


@pytest.fixture(scope="session")
def collate(oracle_folder, markup):
    return MultimodalCollator.from_pretrained(oracle_folder, video_markup=markup)


@pytest.fixture
def both(request, oracle_folder, clips, collate, markup):
    """Our batch and the inputs of the stock model for one conversation."""
    messages = conversations(clips)[request.param]
    inputs = clip_files.oracle_inputs(oracle_folder, messages, wrapped=markup == "wrapped")
    return collate([{"messages": messages}]), inputs


each = pytest.mark.parametrize("both", KINDS, indirect=True)


def pixels_in_order(inputs) -> torch.Tensor:
    """Patches of all media in the order of their placeholders; transformers takes pictures and clips apart."""
    runs = [kind for kind, _ in groupby(inputs["mm_token_type_ids"][0].tolist()) if kind]
    media = {1: inputs.get("image_grid_thw", torch.zeros(0, 3)), 2: inputs.get("video_grid_thw", torch.zeros(0, 3))}
    patches = {1: inputs.get("pixel_values"), 2: inputs.get("pixel_values_videos")}
    lengths = {1: media[1].prod(1).tolist(), 2: [int(h * w) for t, h, w in media[2].tolist() for _ in range(int(t))]}
    parts = {kind: iter(patches[kind].split([int(n) for n in lengths[kind]])) for kind in set(runs)}
    return torch.cat([next(parts[kind]) for kind in runs])


@each
def test_inputs_are_the_same(both, stock):
    batch, inputs = both
    assert batch.input_ids.tolist() == inputs["input_ids"][0].tolist()
    grids = (inputs.get("image_grid_thw"), inputs.get("video_grid_thw"))
    positions, _ = stock.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], *grids)
    assert torch.equal(batch.positions, positions[:, 0])
    assert torch.equal(batch.visual_pos_mask, inputs["mm_token_type_ids"][0].bool())
    assert sorted(batch.grid_thw.tolist()) == sorted(
        grid for of_kind in grids if of_kind is not None for grid in of_kind.tolist()
    )
    assert batch.pixel_values.shape[1] == 1536
    ours = (batch.pixel_values.float() - 127.5) / 127.5
    torch.testing.assert_close(ours, pixels_in_order(inputs), atol=2e-7, rtol=0)  # pictures: two roundings, as there


@torch.no_grad()
@each
def test_logits(both, ours, stock):
    batch, inputs = both
    theirs = stock(**inputs, use_cache=False).logits[0]
    assert theirs.std() > 0.5, "logits this flat would hide a mistake"
    torch.testing.assert_close(ours.logits(batch), theirs, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("markup", ["bare"], indirect=True)  # the other differs in text alone
@pytest.mark.parametrize("both", ["clip and picture"], indirect=True)
def test_loss_and_every_gradient(both, ours, stock):
    batch, inputs = both
    loss_sum, num_labels = ours(batch)
    labels = torch.cat([torch.tensor([IGNORE_LABEL]), batch.labels[:-1]])
    stock.zero_grad(set_to_none=True)
    loss = stock(**inputs, labels=labels[None], use_cache=False).loss
    assert abs((loss_sum / num_labels).item() - loss.item()) <= LOSS
    (loss_sum / num_labels).backward()
    loss.backward()
    theirs = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = theirs[to_huggingface(name)]
        assert (parameter.grad - gradient).norm() <= GRADIENT * gradient.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("markup", ["bare"], indirect=True)  # the other differs in text alone
def test_a_mixed_pack_gives_the_logits_of_each_sample(oracle_folder, ours, stock, clips, collate, markup):
    stills = [sample["messages"] for sample in oracles.conversations().values()]
    mixed = [row for pair in zip(stills, conversations(clips).values(), strict=False) for row in pair]
    batch = collate([{"messages": messages} for messages in mixed])
    assert batch.pixel_values.shape == (batch.num_patches, 1536)
    for messages, piece in zip(mixed, ours.logits(batch).split(batch.segments.lengths), strict=True):
        inputs = clip_files.oracle_inputs(oracle_folder, messages, wrapped=markup == "wrapped")
        torch.testing.assert_close(piece, stock(**inputs, use_cache=False).logits[0], atol=LOGITS, rtol=0)


def test_stills_take_no_more_room_than_before(collate):
    assert collate(list(oracles.conversations().values())).pixel_values.shape[1] == 768


def test_both_markups_as_text(oracle_folder, clips):
    messages = conversations(clips)["plain"]
    pad = "<|video_pad|>" * 6
    frames = f"<0.3 seconds><|vision_start|>{pad}<|vision_end|><1.6 seconds><|vision_start|>{pad}<|vision_end|>"
    question = "What happens here? <0.3 seconds><|im_end|>\n<|im_start|>assistant\nIt moves to the left.<|im_end|>\n"
    for markup, clip in (("bare", frames), ("wrapped", f"<|vision_start|>{frames}<|vision_end|>")):
        collate = MultimodalCollator.from_pretrained(oracle_folder, video_markup=markup)
        batch = collate([{"messages": messages}])
        text = collate.decode(batch.input_ids.tolist(), skip_special_tokens=False)
        assert text == f"<|im_start|>user\n{clip}{question}"


def test_costs_are_the_encoded_lengths(collate, clips):
    for messages in conversations(clips).values():
        cost, encoded = collate.cost({"messages": messages}), collate.encode({"messages": messages})
        assert cost.tokens == encoded.input_ids.numel()
        assert cost.patches == encoded.patches.shape[0] == 4 * cost.visual_tokens
        assert cost.patch_pairs == sum(t * (h * w) ** 2 for t, h, w in encoded.grids)
