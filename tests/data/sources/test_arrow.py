"""Typed files and the plain JSONL of the same rows give the same row objects."""

import json
import pickle

import datasets
import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils.json import json_encode_field, ujson_dumps
from hypothesis import strategies as st

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import open_sources, open_stream
from qwen3vl_train.data.sources.arrow import row_converter
from tests.helpers.messages import message_of


def turns(question, answer, **more):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


PARTS = [{"type": "text", "text": "Zoom / click."}, {"type": "text", "text": "Größe?"}]
TEXTS = ["plain", "7", "007", "1.50", "1e5", "true", "null", "NaN", '{"a": 1}', '{"a":1}', "[1, 2]", "[1,2]", "[] ",
         '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]', '[{"bbox_2d":[1,2,3,4],"label":"cup"}]', "{broken",
         "ü / {}"]  # fmt: skip
ZOOM, CLICK = tool("zoom", factor={"type": "number"}), tool("click", x={"type": "integer", "enum": [1, 5]})
CALLS = [call("zoom", factor=2.0), call("click", x=None, note="5")]
ROWS = [
    {"messages": turns(PARTS, text, tool_calls=CALLS), "tools": [ZOOM, CLICK], "images": [], "other": 1}
    for text in TEXTS
]  # fmt: skip


def json_features():
    """Features in which content, arguments and properties are of mixed types, as `datasets` finds by itself."""
    text, mixed = datasets.Value("string"), datasets.Json()
    function = {"type": text, "function": {"name": text, "arguments": mixed}}
    message = {"role": text, "content": mixed, "tool_calls": [function]}
    parameters = {"type": text, "properties": mixed}
    tools = [{"type": text, "function": {"name": text, "parameters": parameters}}]
    return datasets.Features({"messages": [message], "tools": tools, "other": datasets.Value("int64")})


def write_json_feature(kind, folder):
    """Write ROWS to a file or folder of one kind; return its entry."""
    rows = [{key: row[key] for key in ("messages", "tools", "other")} for row in ROWS]
    if kind in ("lines", "array"):
        folder.mkdir()
        body = json.dumps(ROWS) if kind == "array" else "\n".join(json.dumps(row) for row in ROWS)
        (folder / ("train.json" if kind == "array" else "train.jsonl")).write_text(body)
        return TrainSource(path=str(folder), split="train")
    data = datasets.Dataset.from_list(rows, features=json_features())
    if kind == "saved":
        data.save_to_disk(str(folder))
    elif kind == "saved split":
        datasets.DatasetDict({"train": data}).save_to_disk(str(folder))
    else:
        folder.mkdir()
        data.to_parquet(folder / "train.parquet")
    path = folder / "train.parquet" if kind == "parquet" else folder
    return TrainSource(path=str(path), split="train" if "split" in kind else None)


def raw_rows(entry):
    """Return the row objects as the map-style source gives them."""
    return [source.raw(row).row for source in open_sources(entry) for row in range(len(source))]


@pytest.mark.parametrize("kind", ["parquet", "parquet split", "saved", "saved split", "lines", "array"])
def test_json_feature_equals_plain_json(tmp_path, kind):
    entry = write_json_feature(kind, tmp_path / "data")
    expected = [{key: row[key] for key in ("messages", "tools")} for row in ROWS]
    found = raw_rows(entry)
    for row, plain in zip(found, expected, strict=True):
        assert {key: row[key] for key in plain} == plain
    (source,) = open_sources(entry)
    assert "other" in source.ignored_columns
    assert pickle.loads(pickle.dumps(source)).raw(3).row == found[3]
    rules = RowRules()
    samples = [rules.sample(row, source.rules.sample_id(source.file, number), source.media_root)
               for number, row in enumerate(expected, start=1)]  # fmt: skip
    assert [source.sample(row) for row in range(len(source))] == samples
    stream = open_stream(entry)
    streamed = list(stream.rows())
    assert [row.sample for row in streamed] == samples
    assert stream.ignored_columns == source.ignored_columns
    state = json.loads(json.dumps(streamed[4].state))
    assert [row.sample for row in pickle.loads(pickle.dumps(open_stream(entry))).rows(state)] == samples[5:]


def test_ambiguous_json_text_is_a_fault_of_its_row(tmp_path):
    rows = [{"messages": turns(PARTS, answer)} for answer in ("yes", "[]", "no")]
    message = {"role": datasets.Value("string"), "content": datasets.Json()}
    data = datasets.Dataset.from_list(rows, features=datasets.Features({"messages": [message]}))
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        entry = TrainSource(path=str(tmp_path / name))
        (source,) = open_sources(entry)
        assert message_of(RowFault, source.sample, 1) == (
            "messages: is [] as `datasets` stores it, be it text or an empty list; read the JSON file itself, without "
            "split"
        )
        assert [isinstance(row.sample, RowFault) for row in open_stream(entry).rows()] == [False, True, False]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "a", "text"]), inner),
    max_leaves=6,
)
ANY_PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)}), min_size=1)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.text(max_size=9) | JSON.map(json.dumps) | JSON.map(ujson_dumps) | ANY_PARTS)
def test_any_content_survives_the_json_feature(content):
    """Except for texts that `datasets` stores as it stores other values: in quotes, or objects like parts."""
    schema = pa.schema({"content": pa.json_()})
    stored = json_encode_field({"content": content}, ["content"])
    try:
        found = json.loads(stored["content"])
    except ValueError:
        found = None
    if isinstance(content, str) and content == stored["content"] and found is not None:
        hypothesis.assume(not isinstance(found, str))  # a text in double quotes
        is_as_stored = found == [] or (('"type"' in content or '"text"' in content) and content == ujson_dumps(found))
        hypothesis.assume(not is_as_stored and '"type": "text"' not in content)
    assert row_converter(schema, RowRules())(stored) == {"content": content}


@pytest.mark.parametrize("num_rows", [1, 2, 300])
def test_fields_that_are_null_in_every_row(tmp_path, num_rows):
    """Of structs in a list, pyarrow cannot cast such a field."""
    rows = [{"messages": [{**turn, "tool_calls": None} for turn in turns(f"Nr {n}?", "ok")], "tools": None,
             "images": []} for n in range(num_rows)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    expected = [{"messages": turns(f"Nr {n}?", "ok"), "tools": None, "images": []} for n in range(num_rows)]
    entry = TrainSource(path=str(tmp_path / "a.parquet"))
    assert raw_rows(entry) == expected
    assert [row.sample.messages[0].text for row in open_stream(entry).rows()] == [f"Nr {n}?" for n in range(num_rows)]
    assert raw_rows(TrainSource(path=str(tmp_path), split="train")) == expected


def test_dictionary_columns(tmp_path):
    """An Arrow file cannot replace a dictionary from one batch to the next."""
    roles = pa.dictionary(pa.int32(), pa.string())
    turn = pa.struct({"role": roles, "content": pa.string(), "name": pa.null()})
    schema = pa.schema({"messages": pa.list_(turn), "images": roles})
    rows = [{"messages": turns(f"Nr {n}?", "ok"), "images": f"{n % 9}.png"} for n in range(200)]
    parts = [pa.Table.from_pylist(rows[start : start + 70], schema=schema) for start in (0, 70, 140)]
    pq.write_table(pa.concat_tables(parts), tmp_path / "a.parquet", row_group_size=90)
    entry = TrainSource(path=str(tmp_path / "a.parquet"))
    assert raw_rows(entry) == rows
    assert len(list(open_stream(entry).rows())) == 200


def test_nulls_of_absent_keys_are_dropped(tmp_path):
    tools = [tool("zoom", factor={"type": "number"}), tool("click", x={"type": "integer"})]
    calls = [call("zoom", factor=2.0), call("click", x=5)]
    parts = [{"type": "image", "image": {"bytes": b"x", "path": None}}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": parts}], "tools": tools, "system": None,
           "images": [None, {"bytes": None, "path": None}]}  # fmt: skip
    other = {"messages": [{"role": "assistant", "content": [], "tool_calls": calls}], "tools": [], "images": [],
             "system": "Help."}  # fmt: skip
    data = datasets.Dataset.from_list([row, other])
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        assert raw_rows(TrainSource(path=str(tmp_path / name))) == [row, other]


def test_explicit_null_in_json_stays(tmp_path):
    row = {"messages": turns("?", "x", tool_calls=[call("f", x=None, y=[None, {"z": None}])])}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert raw_rows(TrainSource(path=str(tmp_path / "a.jsonl"))) == [row]


def test_class_labels_are_read_as_their_names(tmp_path):
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"question": datasets.Value("string"), "answer": names, "all": [{"kind": names}]})
    rows = [{"question": "?", "answer": answer, "all": [{"kind": answer}]} for answer in (1, 0, None)]
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    for name, split in (("train.parquet", None), ("", "train"), ("saved", None)):
        entry = TrainSource(path=str(tmp_path / name), split=split, columns={"system": "all"})
        assert raw_rows(entry) == [
            {"question": "?", "answer": "dog", "all": [{"kind": "dog"}]},
            {"question": "?", "answer": "cat", "all": [{"kind": "cat"}]},
            {"question": "?", "answer": None, "all": [{}]},
        ]
        entry = TrainSource(path=str(tmp_path / name), split=split)
        assert [row.sample.messages[-1].text for row in list(open_stream(entry).rows())[:2]] == ["dog", "cat"]


def test_class_label_out_of_range():
    feature = {"answer": {"names": ["cat"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
    convert = row_converter(pa.schema({"answer": pa.int64()}, metadata=metadata), RowRules())
    assert convert({"answer": -1}) == {"answer": None}
    assert message_of(RowFault, convert, {"answer": 3}) == "answer: class 3 of 1; write the names of classes as text"


def test_json_known_by_metadata_alone():
    """Other versions of Arrow give the extension type as plain text, and older `datasets` write lists otherwise."""
    json_type = {"_type": "Json"}
    for feature in ([{"content": json_type}], {"feature": {"content": json_type}, "_type": "LargeList"}):
        metadata = {"huggingface": json.dumps({"info": {"features": {"messages": feature}}})}
        schema = pa.schema({"messages": pa.list_(pa.struct({"content": pa.string()}))}, metadata=metadata)
        row = {"messages": [{"content": '[{"type":"text","text":"Hi"}]'}, None, {"content": '"Hi"'}]}
        assert row_converter(schema, RowRules())(row) == {
            "messages": [{"content": [{"type": "text", "text": "Hi"}]}, None, {"content": "Hi"}]
        }


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": []}}', b'{"info": null}', b"\xff"])
def test_foreign_metadata_is_ignored(metadata):
    schema = pa.schema({"answer": pa.int64()}, metadata={b"huggingface": metadata})
    assert row_converter(schema, RowRules())({"answer": 1}) == {"answer": 1}


def test_sequences_of_structs_and_maps():
    feature = {"feature": {"kind": {"names": ["cat"], "_type": "ClassLabel"}}, "_type": "Sequence"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"boxes": feature}}})}
    schema = pa.schema(
        {"boxes": pa.struct({"kind": pa.list_(pa.int64())}), "tools": pa.map_(pa.string(), pa.int64())},
        metadata=metadata,
    )
    batch = pa.RecordBatch.from_pylist([{"boxes": {"kind": [0, None]}, "tools": {"x": 1, "y": None}}], schema=schema)
    assert row_converter(schema, RowRules())(batch.to_pylist()[0]) == {
        "boxes": {"kind": ["cat", None]}, "tools": {"x": 1, "y": None},
    }  # fmt: skip
