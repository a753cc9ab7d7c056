"""Boxes of every convention are written in Qwen3-VL's 0 to 1000; anything but a box inside its image is a fault."""

import io

import pytest
from PIL import Image

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.rows.boxes import Convention
from qwen3vl_train.data.rows.parse import RowRules
from tests.helpers.messages import message_of

IMAGE = Image.new("RGB", (640, 480))


def read(boxes, convention=("pixel", "xyxy"), text="<box>", images=(IMAGE,), **row):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "Where?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
    rules = RowRules(boxes=Convention(*convention))
    return rules.sample({"messages": messages, "boxes": boxes, **row}, "a:1").messages[1].text


@pytest.mark.parametrize(
    ("convention", "box"),
    [
        (("pixel", "xyxy"), [64, 48, 320, 240]),
        (("pixel", "xywh"), [64, 48, 256, 192]),
        (("unit", "xyxy"), [0.1, 0.1, 0.5, 0.5]),
        (("unit", "xywh"), [0.1, 0.1, 0.4, 0.4]),
        (("per_mille", "xyxy"), [100, 100, 500, 500]),
        (("per_mille", "xywh"), [100, 100, 400, 400]),
    ],
)
def test_every_convention_writes_the_same_box(convention, box):
    assert read([box], convention, '[{"bbox_2d": <box>, "label": "cup"}]') == (
        '[{"bbox_2d": [100, 100, 500, 500], "label": "cup"}]'
    )
    unit, layout = convention
    assert read([box], (None, "xyxy"), bbox=unit, bbox_layout=layout) == "[100, 100, 500, 500]"


def test_boxes_fill_placeholders_in_order_over_all_texts():
    asked = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "At <point>, <box>?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "<box> and <point>"}]
    row = {"messages": messages, "boxes": [[0, 0, 64, 48], [0, 0, 640, 480]], "points": [[64, 48], [320, 240]]}
    first, second = RowRules(boxes=Convention("pixel")).sample(row, "a:1").messages
    assert (first.text, second.text) == ("At [100, 100], [0, 0, 100, 100]?", "[0, 0, 1000, 1000] and [500, 500]")


def test_boxes_do_not_depend_on_the_resized_image(tiny_folder):
    """An image shrunk by a budget, and one whose sides are rounded: the box keeps its fraction of the image."""
    for size in ((640, 480), (1999, 333)):
        row = {"boxes": [[size[0] / 4, size[1] / 4, size[0] / 2, size[1] / 2]], "bbox": "pixel", "image": "a.png",
               "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<box>"}]}  # fmt: skip
        out = io.BytesIO()
        Image.new("RGB", size).save(out, "PNG")
        sample = RowRules().sample({**row, "image": out.getvalue()}, "a:1")
        for budget in (4, 64):
            collate = MultimodalCollator.from_pretrained(tiny_folder, max_visual_tokens_per_image=budget)
            ids = collate.encode(sample).input_ids.tolist()
            assert "assistant\n[250, 250, 500, 500]<|im_end|>" in collate.decode(ids, skip_special_tokens=False)


def test_pixels_refer_to_the_image_after_exif_rotation():
    """A phone's upright photo is stored lying: 200x100 in the file, 100x200 as seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (200, 100)).save(out, "JPEG", exif=exif)
    assert read([[50, 50, 100, 200]], images=(out.getvalue(),)) == "[500, 250, 1000, 1000]"


def test_one_of_several_images():
    images = (IMAGE, Image.new("RGB", (100, 100)))
    assert read([{"box": [10, 10, 50, 50], "image": 1}], images=images) == "[100, 100, 500, 500]"
    assert read([[0.1, 0.1, 0.5, 0.5]], ("unit", "xyxy"), images=images) == "[100, 100, 500, 500]"


def test_boxes_may_exceed_the_image_by_rounding():
    assert read([[-0.3, 0, 640.3, 480]]) == "[0, 0, 1000, 1000]"


def test_placeholders_without_boxes_are_text():
    assert read(None, (None, "xyxy"), "tick the <box>") == "tick the <box>"
    assert read([[1, 2, 3, 4]], (None, "xyxy"), "no mark") == "no mark"


def test_objects_of_swift_fill_its_marks():
    objects = {"ref": ["the cup", "cup"], "bbox": [[64, 48, 320, 240], [64, 48]]}
    text = 'Find <ref-object>: [{"bbox_2d": <bbox>, "label": "<ref-object>"}], <bbox>'
    filled = 'Find the cup: [{"bbox_2d": [100, 100, 500, 500], "label": "cup"}], [100, 100]'
    assert read(None, (None, "xyxy"), text, objects=objects) == filled
    unit = {"bbox": [[0.1, 0.1, 0.5, 0.5]], "bbox_type": "norm1"}
    assert read(None, (None, "xyxy"), "<bbox>", objects=unit) == "[100, 100, 500, 500]"
    images = (IMAGE, Image.new("RGB", (100, 100)))
    second = {"bbox": [[10, 10, 50, 50]], "image_id": [1]}
    assert read(None, (None, "xyxy"), "<bbox>", images, objects=second) == "[100, 100, 500, 500]"


def test_objects_without_marks_are_metadata():
    row = {"question": "What?", "answer": "A cup.", "objects": {"bbox": [[1, 2, 3, 4]], "category": [7]}}
    assert RowRules().sample(row, "a:1").ignored == ("row.objects",)


def test_one_box_may_be_a_column_of_numbers():
    row = {"image": IMAGE, "question": "Press OK", "answer": "<box>", "bbox": [0.1, 0.1, 0.5, 0.5]}
    rules = RowRules(columns={"boxes": "bbox"}, boxes=Convention("unit"))
    assert rules.sample(row, "a:1").messages[1].text == "[100, 100, 500, 500]"
    unread = RowRules().sample({**row, "answer": "click"}, "a:1")
    assert (unread.messages[1].text, unread.ignored) == ("click", ("row.bbox",))


FAULTS = [
    ({"boxes": [[0, 0, 700, 480]]}, "boxes[0] [0.0, 0.0, 700.0, 480.0] read as pixel, xyxy leaves its image of 640x480 "
     "pixels; check bbox and bbox_layout"),
    ({"boxes": [[0, 0, 64, 48]], "convention": ("unit", "xyxy")}, "boxes[0] [0.0, 0.0, 64.0, 48.0] read as unit, xyxy "
     "leaves 0 to 1; check bbox and bbox_layout"),
    ({"boxes": [[0, 0, 1001, 48]], "convention": ("per_mille", "xyxy")}, "boxes[0] [0.0, 0.0, 1001.0, 48.0] read as "
     "per_mille, xyxy leaves 0 to 1000; check bbox and bbox_layout"),
    ({"boxes": [[100, 100, 50, 60]]}, "boxes[0] [100.0, 100.0, 50.0, 60.0] read as xyxy has no area; is its layout "
     "xywh?"),
    ({"boxes": [[100, 100, 0, 60]], "convention": ("pixel", "xywh")}, "boxes[0] [100.0, 100.0, 0.0, 60.0] read as xywh "
     "has no area; is its layout xyxy?"),
    ({"boxes": [[0, float("nan"), 1, 1]]}, "boxes[0] is [0, nan, 1, 1], not 4 finite numbers; fix the box"),
    ({"boxes": [[0, 0, 1, float("inf")]]}, "boxes[0] is [0, 0, 1, inf], not 4 finite numbers; fix the box"),
    ({"boxes": [[0, 0, True, 1]]}, "boxes[0] is [0, 0, True, 1], not 4 finite numbers; fix the box"),
    ({"boxes": [[0, 0, 1]]}, "boxes[0] is not a list of 4 numbers; write [x, y, x, y]"),
    ({"boxes": "x"}, "boxes is not a list; write a list of boxes"),
    ({"boxes": [[0, 0, 1, 1]] * 2}, "2 boxes but 1 <box> placeholder in the text; write one placeholder for each"),
    ({"boxes": [], "points": [[1, 1]], "text": "x"},
     "1 point but 0 <point> placeholders in the text; write one placeholder for each"),
    ({"boxes": [[0, 0, 1, 1]], "convention": (None, "xyxy")},
     "boxes without a stated convention; set bbox to pixel, unit, "
     "per_mille in the row or the recipe"),
    ({"boxes": [[0, 0, 1, 1]], "bbox": "pixels"}, "bbox is 'pixels'; use pixel, unit, per_mille, and list boxes under "
     "boxes"),
    ({"boxes": None, "bbox": [0, 0, 1, 1]}, "0 boxes but 1 <box> placeholder in the text; write one placeholder for "
     "each, or name their column: columns: {boxes: bbox}"),
    ({"boxes": None, "text": "<bbox>"},
     "<bbox> in the text but no objects in the row; write objects: {ref: [...], bbox: [...]}"),
    ({"boxes": None, "text": "<bbox>", "objects": {"ref": ["cup"]}},
     "objects.ref has 1 entries for 0 <ref-object> in the text; write one for each"),
    ({"boxes": None, "text": "<bbox><bbox>", "objects": {"bbox": [[0, 0, 1, 1]]}},
     "objects.bbox has 1 entries for 2 <bbox> in the text; write one for each"),
    ({"boxes": None, "text": "<bbox>", "objects": {"bbox": [[0, 0, 1, 1]], "bbox_type": "rel"}},
     "objects.bbox_type is 'rel'; use real, norm1, norm1000"),
    ({"boxes": None, "text": "<bbox>", "objects": {"bbox": [[0, 0, 1, 1]], "image_id": [0, 1]}},
     "objects.image_id is not a list of one image for each bbox; write one for each"),
    ({"boxes": [[0, 0, 1, 1]], "images": ()}, "boxes[0]: in pixels of one of 0 images; say which: "
     '{"box": [...], "image": 0}'),
    ({"boxes": [[0, 0, 1, 1]], "images": (IMAGE, IMAGE)}, "boxes[0]: in pixels of one of 2 images; say which: "
     '{"box": [...], "image": 0}'),
    ({"boxes": [{"box": [0, 0, 1, 1], "image": 1}]}, "boxes[0]: image is 1 of 1; images count from 0"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "fault"), FAULTS, ids=lambda value: str(value)[:70])
def test_faults(case, fault):
    assert message_of(RowFault, read, **case) == fault


def test_fault_of_an_image_names_its_box():
    with pytest.raises(MediaFault, match=r"^boxes\[0\]: image of 4 bytes: is not an image"):
        read([[0, 0, 1, 1]], images=(b"junk",))
