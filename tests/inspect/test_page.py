"""The page loads nothing, runs only its own script, and no data can become markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from qwen3vl_train.inspect.page import embedded_json, render_page
from tests.helpers import finding_rows as rows


@pytest.fixture(scope="module")
def page(inspection):
    return render_page(inspection)


class Elements(HTMLParser):
    """Collect start tags with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_asks_nothing_of_a_network(page):
    for tag, attributes in Elements(page).tags:
        assert not {"src", "srcset", "action", "poster"} & attributes.keys(), tag
        assert attributes.get("href", "data:").startswith("data:")
    assert "url(" not in page
    assert "@import" not in page


def test_policy_allows_only_the_own_script_and_style(page):
    elements = Elements(page)
    policy = next(attributes["content"] for tag, attributes in elements.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    assert (len(scripts), len(styles)) == (1, 1)
    for name, text in (("script-src", scripts[0]), ("style-src", styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy


def test_data_cannot_leave_its_element(page):
    assert page.count("</script>") == 2
    assert rows.ATTACK not in page
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert embedded is not None
    assert not set("<>&") & set(embedded[1])
    shown = next(sample for sample in json.loads(embedded[1])["samples"] if sample["row"] == str(rows.SCRIPT))
    assert rows.ATTACK in "".join(shown["texts"])


@pytest.mark.parametrize(
    "text", ["</script>", "<!--<script>", "]]>", "&lt;", "\u2028\u2029", "\ud800", "\x00", "\\u003c"]
)
def test_embedded_json_is_the_same_data(text):
    embedded = embedded_json({text: [text]})
    assert embedded.isascii()
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == {text: [text]}


def test_name_of_the_recipe_is_escaped_in_the_title(inspection):
    from dataclasses import replace

    named = replace(inspection, facts=replace(inspection.facts, recipe="<b>$script&"))
    assert "<title>Data of &lt;b&gt;$script&amp;</title>" in render_page(named)


def test_scripts_write_no_markup():
    from importlib import resources

    for file in (resources.files("qwen3vl_train.inspect") / "page").iterdir():
        if file.name.endswith(".js"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text), (
                file.name
            )
