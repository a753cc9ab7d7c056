"""The terminal shows the same facts, and no text of the data is taken for markup."""

from dataclasses import replace
from io import StringIO

from rich.console import Console

from qwen3vl_train.inspect.table import print_facts


def printed(facts, width=100):
    out = StringIO()
    print_facts(facts, Console(file=out, width=width, no_color=True))
    return out.getvalue()


def test_names_sources_rejects_packs_and_findings(inspection):
    text = printed(inspection.facts)
    packs = inspection.facts.packs
    assert f"{packs.packs} packs an epoch, {100 * packs.mean_fill:.1f}% of 512 tokens filled" in text
    assert "2 of 19 rows rejected (missing_file) train.jsonl:16: " in text
    assert "missing.png: no such file" in text
    for finding in inspection.facts.findings:
        assert finding.remedy in text
        assert finding.evidence in text
    training = inspection.facts.sources[0].histograms["text_tokens"]
    assert f"{training.median:,.0f}/{training.p95:,.0f}/{training.maximum:,.0f}" in text


def test_columns_without_a_count_are_omitted(inspection):
    whole, *_ = printed(inspection.facts, width=160).split("median/95th")
    assert all(heading in whole for heading in ("rejected", "no label", "repeats", "images"))
    assert not any(heading in whole for heading in ("videos", "dropped"))
    clips = replace(inspection.facts.sources[1], videos=4321, dropped=17)
    text = printed(replace(inspection.facts, sources=[clips]), width=160)
    assert all(word in text for word in ("videos", "4,321", "dropped", "17"))
    assert "images" not in text.split("source", 2)[1]


def test_brackets_in_data_are_text(inspection):
    source = replace(inspection.facts.sources[0], name="[red]odd[/] name")
    text = printed(replace(inspection.facts, sources=[source]), width=200)
    assert text.count("[red]odd[/] name") == 2 + len(source.rejects)  # both tables, and each reason


def test_says_when_nothing_looks_wrong(inspection):
    assert "nothing looks wrong" in printed(replace(inspection.facts, findings=[]))
