import json
import resource
import sys

import pytest
import tiny_checkpoint

from qwen3vl_train.data.encode.template import check_template, find_template, render_template
from tests.helpers.messages import message_of

TEMPLATES = {
    name: (tiny_checkpoint.ASSETS / f"chat_template_{name}.jinja").read_text() for name in ("instruct", "thinking")
}


def test_rendering_equals_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "é <b>"}, {"role": "assistant", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    for template in TEMPLATES.values():
        theirs, _ = render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=True)
        assert render_template(template, messages, tools, True) == theirs[0]


@pytest.mark.parametrize(
    ("old", "new", "probe"),
    [
        ("{%- else %}\n    {%- if messages[0].role == 'system' %}\n        {{- '<|im_start|>system\\n' }}",
         "{%- else %}\n    {%- if messages[0].role == 'system' %}\n        {{- '<|im_start|>system' }}", "system"),
        ("{%- if add_generation_prompt %}", "{%- if not add_generation_prompt %}", "question"),
        ("'image_url' in content %}", "'picture' in content %}", "picture by url"),
        ("\\n</tool_response>' }}", "</tool_response>' }}", "calls"),
        ("if (loop.first and message.content) or (not loop.first)", "if not loop.first", "calls"),
        ("{{- content_item.text }}", "{{- content_item.text | trim }}", "two turns"),
        ("        {{- '\\n\\n' }}\n", "        {{- '\\n' }}\n", "tools"),
    ],
)  # fmt: skip
def test_every_changed_branch_is_found(old, new, probe):
    assert old in TEMPLATES["instruct"]
    with pytest.raises(ValueError, match=f"^chat_template: probe '{probe}' renders ") as caught:
        check_template(TEMPLATES["instruct"].replace(old, new))
    assert str(caught.value).endswith("; use the template this checkpoint was published with")


def with_marks(template):
    """The template with `{% generation %}` marks around each assistant turn, as training templates have them."""
    before, branch, rest = template.partition('{%- elif message.role == "assistant" %}')
    turn, end, after = rest.partition('    {%- elif message.role == "tool" %}')
    return f"{before}{branch}\n{{%- generation %}}{turn}{{%- endgeneration %}}\n{end}{after}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_marks_change_nothing_that_is_rendered(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = with_marks(TEMPLATES[name])
    assert marked != TEMPLATES[name]
    assert check_template(marked) == name
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    theirs, _ = render_jinja_template([messages], chat_template=marked)
    assert render_template(marked, messages, None, False) == theirs[0]


def test_changed_thinking_template_is_found():
    changed = TEMPLATES["thinking"].replace("ns.last_query_index = index", "ns.last_query_index = 0")
    with pytest.raises(ValueError, match="but Qwen3-VL thinking renders"):
        check_template(changed)


def test_messages_about_other_templates():
    assert message_of(ValueError, check_template, "{{ messages[0].content }}", "a.jinja") == (
        "a.jinja: probe 'question' renders 'Hi', but Qwen3-VL instruct renders '<|im_start|>user\\nHi<'; "
        "use the template this checkpoint was published with"
    )
    for template in ("{{ x", "{{ raise_exception('no') }}", "{{ messages + 1 }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ValueError, match=r"^b: (cannot be rendered \(.*\); copy|probe)"):
            check_template(template, "b")


def test_template_files_by_precedence(tmp_path):
    assert message_of(ValueError, find_template, tmp_path) == (
        f"{tmp_path}: no chat template (chat_template.jinja, chat_template.json, or chat_template in "
        "tokenizer_config.json); copy it from the checkpoint"
    )
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert find_template(tmp_path) == ("d", str(config))
    config.write_text(json.dumps({"chat_template": "c"}))
    assert find_template(tmp_path) == ("c", str(config))
    (tmp_path / "chat_template.json").write_text('{"chat_template": "b"}')
    assert find_template(tmp_path) == ("b", str(tmp_path / "chat_template.json"))
    (tmp_path / "chat_template.jinja").write_text("a")
    assert find_template(tmp_path) == ("a", str(tmp_path / "chat_template.jinja"))


def test_broken_template_file_is_named(tmp_path):
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ValueError, match=r"chat_template\.json: not a JSON object \(.*\); copy the file again"):
        find_template(tmp_path)


RUNAWAYS = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "it takes more than 200,000",
    "{{ 'x' * 10000000000 }}": "* of large values",
    "{{ 9 ** 99999999 }}": "** of large values",
    "{{ 'x' | center(9000000000) }}": "MemoryError",
    "{% set n = namespace(x='xx') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "MemoryError",
    "{{ messages[9].content.x }}": "list object has no element 9",
    "{{ 1 / 0 }}": "division by zero",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth exceeded",
    "{{ raise_exception('no') }}": "no",
    "{% if %}": "Expected an expression",
    "x" * 1_000_001: "it has 1,000,001 characters, more than 1,000,000",
}


@pytest.mark.parametrize("template", RUNAWAYS, ids=lambda text: text[:40])
def test_templates_that_raise_or_run_away_are_refused(template):
    before = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError) as caught:
        check_template(template, "here")
    assert str(caught.value).startswith(f"here: cannot be rendered ({RUNAWAYS[template]}")
    assert (sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)) == before
