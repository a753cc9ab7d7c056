"""What is shown of a sample is what the encoder made: pixels, tokens, weights, positions, boundaries."""

import base64
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3vl_train.data.media.image import load_rgb, resize_to_patches
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.inspect.samples import token_texts, unpatch
from tests.helpers import finding_rows as rows
from tests.helpers.small_runs import picture


def sample_of(inspection, line, source="train.jsonl"):
    return next(one for one in inspection.samples if one["row"] == str(line) and one["source"] == source)


def pixels_of(frame):
    header, _, body = frame["src"].partition(",")
    return header, np.asarray(Image.open(BytesIO(base64.b64decode(body))).convert("RGB"), dtype=np.int16)


def test_unpatch_is_the_inverse_of_patching(data_folder):
    rgb = load_rgb(str(data_folder / "wide.png"))
    assert np.array_equal(unpatch(resize_to_patches(rgb, (4, 8)), 4, 8), rgb.permute(1, 2, 0))
    pairs = resize_to_patches(rgb, (4, 8)).reshape(-1, 3, 1, 16, 16).repeat(1, 1, 2, 1, 1).reshape(-1, 1536)
    assert np.array_equal(unpatch(pairs, 4, 8), rgb.permute(1, 2, 0))


def test_image_is_the_one_the_model_sees(inspection, data_folder):
    small = sample_of(inspection, rows.PLAIN)["frames"][0]
    header, pixels = pixels_of(small)
    assert header == "data:image/png;base64"
    assert np.array_equal(pixels, np.asarray(Image.open(data_folder / "wide.png"), dtype=np.int16))
    shrunk = sample_of(inspection, rows.SHRUNK)["frames"][0]
    assert shrunk["rows"] * shrunk["cols"] <= 24
    assert (shrunk["width"], shrunk["height"]) == (32 * shrunk["cols"], 32 * shrunk["rows"])
    header, pixels = pixels_of(shrunk)
    assert pixels.shape == (shrunk["height"], shrunk["width"], 3)


def test_large_image_is_a_jpeg(tmp_path):
    from qwen3vl_train.inspect.samples import data_uri

    assert data_uri(Image.new("RGB", (320, 320))).startswith("data:image/jpeg;base64,")
    _, pixels = pixels_of({"src": data_uri(Image.new("RGB", (6400, 320)))})
    assert pixels.shape == (80, 1600, 3)


def test_weights_are_those_of_the_tokens_that_are_written(inspection):
    sample = sample_of(inspection, rows.WEIGHTED)
    words = "".join(sample["texts"])
    runs = {}
    for text, weight in zip(sample["texts"], sample["weights"], strict=True):
        runs[weight] = runs.get(weight, "") + text
    assert runs[1.0] == "first answer<|im_end|>"
    assert runs[2.5] == "heavy answer ü数😀<|im_end|>"
    assert "light answer" in runs[0.0]
    assert words.count("<|im_start|>") == 6


def test_ids_positions_and_slices_are_the_encoders(inspection, collate, data_folder):
    sample = sample_of(inspection, rows.PLAIN)
    encoded = collate.encode(JsonlSource(data_folder / "train.jsonl", data_folder).sample(rows.PLAIN - 1))
    assert sample["positions"] == encoded.positions.tolist()
    assert sample["ids"] == encoded.input_ids.tolist()
    assert sample["visual"] == [[slot.offset, slot.length] for slot in encoded.slices]
    assert sample["frames"][0]["offset"] == encoded.slices[0].offset
    specials = {sample["texts"][place] for place in sample["special"]}
    assert specials == {"<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"}


def test_typed_markup_is_shown_as_text(inspection):
    sample = sample_of(inspection, rows.MARKUP)
    assert "<|image_pad|>" in "".join(sample["texts"])
    assert all(sample["texts"][place] != "<|image_pad|>" for place in sample["special"])


@pytest.mark.parametrize(
    "text", ["plain", "ü数😀", "👩‍👩‍👧‍👦 family", "a\ufffdb", "\u0627\u0644\u0639 \u0e01\u0e33", "\n\n\t x"]
)
def test_texts_of_tokens_join_to_the_text(collate, text):
    ids, _ = collate.tokenizer.encode(text)
    texts = token_texts(ids, collate.tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == collate.decode(ids)


def test_part_of_a_character_loses_nothing_after_it(collate):
    ids, _ = collate.tokenizer.encode("数")
    tail, _ = collate.tokenizer.encode("ab")
    assert len(ids) > 1
    assert token_texts([ids[0], *tail], collate.tokenizer)[0] == "\ufffd"
    assert "".join(token_texts([ids[0], *tail], collate.tokenizer)[1:]) == "ab"


def test_boxes_are_drawn_only_if_image_and_numbers_are_certain(inspection):
    (cup,) = sample_of(inspection, rows.BOXES)["marks"]
    assert cup == {"values": (100, 250, 600, 750), "label": "<b>cup</b>", "medium": 0}
    assert [mark["medium"] for mark in sample_of(inspection, rows.PIXEL)["marks"]] == [None]


def test_shown_pack_holds_several_samples_end_to_end(inspection):
    pack = inspection.pack
    assert 1 <= pack["number"] <= inspection.facts.packs.packs
    assert pack["max_tokens"] == 512
    assert len(pack["sequences"]) > 1
    start, by_id = 0, {sample["id"]: sample for sample in reversed(inspection.samples)}  # the first of an id
    for sequence in pack["sequences"]:
        assert sequence["start"] == start
        start += sequence["length"]
        assert sum(length for _, length in sequence["runs"]) == sequence["length"]
        sample = by_id[sequence["id"]]
        trained = sum(length for use, length in sequence["runs"] if use == "trained")
        assert trained == sum(weight > 0 for weight in sample["weights"])
        assert sequence["last_position"] == [axis[-1] for axis in sample["positions"]]
    assert start <= 512


def test_shown_pack_has_the_right_number(recipe, inspection):
    from qwen3vl_train.dist.ranks import Ranks
    from qwen3vl_train.train.data import open_data

    data = open_data(recipe, Ranks(0, 1, 0, torch.device("cpu")))
    places = [data.index.locate(number) for number in data.loader.epoch_packs(0)[inspection.pack["number"] - 1].rows]
    names = [data.loader.producer.sources[place].sample(row).sample_id for place, row in places]
    assert [sequence["id"] for sequence in inspection.pack["sequences"]] == names


def test_one_sample_for_each_failed_check_comes_first(recipe):
    from qwen3vl_train.inspect.recipe import inspect_recipe

    few = inspect_recipe(recipe, num_samples=9)
    assert len(few.samples) == 9
    checks = {check for sample in few.samples for check in sample["checks"]}
    assert {"boxes_pixel", "boxes_unit", "boxes_xywh", "special_token", "empty_answer", "enlarged"} <= checks


def test_clip_is_shown_pair_by_pair_beside_a_still(collate, tmp_path):
    from qwen3vl_train.inspect.samples import view_frames, view_tokens
    from tests.helpers import clip_files

    clip = clip_files.write_clip(tmp_path / "clip.mp4", 24)
    parts = [{"type": "video", "video": str(clip)}, {"type": "image", "image": picture(64, 64, 0)}]
    encoded = collate.encode(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "both"}]}
    )
    frames = view_frames(encoded)
    pairs = encoded.grids[0][0]
    order = [*((0, pair, pairs) for pair in range(pairs)), (1, 0, 1)]
    assert [(one["medium"], one["frame"], one["frames"]) for one in frames] == order
    shown = view_tokens(encoded, collate.tokenizer)
    assert [one["offset"] for one in frames] == [offset for offset, _ in shown["visual"]]
    assert [one["rows"] * one["cols"] for one in frames] == [length for _, length in shown["visual"]]
    assert "<0.3 seconds>" in "".join(shown["texts"])
    _, still = pixels_of(frames[-1])
    assert np.array_equal(still, np.asarray(picture(64, 64, 0), dtype=np.int16))
    _, first = pixels_of(frames[0])
    smooth = clip_files.smooth(24, 64, 96)[0].astype(np.int16)
    assert np.abs(first - smooth).mean() < 12  # a codec and a resize lie between; another frame is further off
    assert np.abs(first - clip_files.smooth(24, 64, 96)[12]).mean() > 20


def test_of_a_long_clip_evenly_spread_pairs_are_shown():
    from qwen3vl_train.batch import VisionSlice
    from qwen3vl_train.data.encode.encoder import EncodedSample
    from qwen3vl_train.inspect.samples import view_frames

    slices = [VisionSlice(10 * pair, 1, pair) for pair in range(100)]
    patches = torch.zeros(400, 1536, dtype=torch.uint8)
    empty = torch.zeros(0, dtype=torch.int64)
    frames = view_frames(
        EncodedSample(empty, empty, empty, empty.float(), empty, slices, [(100, 2, 2)], patches, "clip")
    )
    assert [one["frame"] for one in frames][::5] == [0, 33, 66, 99]
    assert len(frames) == 16
    assert [one["offset"] for one in frames] == [10 * one["frame"] for one in frames]
