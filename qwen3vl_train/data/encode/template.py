"""Find the checkpoint's chat template, and check that one of our dialects renders exactly the same."""

import contextlib
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_train.data.encode.chat import DIALECTS, as_text
from qwen3vl_train.data.rows.parse import parse_sample

if TYPE_CHECKING:
    from jinja2 import Template


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


_TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {"type": "object"}}}]
_ASK = _user("Hi")
_KIND = [_text("Be"), _text(" kind")]
_PICTURE = {"type": "image", "image": "a.png"}
_CLIP = {"type": "video", "video": "a.mp4"}
_CALLS = [
    {"type": "function", "function": {"name": "f", "arguments": {"x": "é", "n": [1, None]}}},
    {"name": "g", "arguments": '{"raw": 1}'},
]
_RESULTS = [{"role": "tool", "content": "one"}, {"role": "tool", "content": [_text("two"), _PICTURE]}]

_COMMON: dict[str, dict[str, Any]] = {
    "question": {"messages": [_ASK]},
    "system": {"messages": [{"role": "system", "content": " Be kind.\n"}, _ASK]},
    "system in parts": {"messages": [{"role": "system", "content": _KIND}, _ASK]},
    "two turns": {"messages": [_ASK, _answer("\n\nHello "), _user(" And?\n"), _answer(_KIND)]},
    "pictures": {"messages": [_user([_PICTURE, _text("a"), _PICTURE, _PICTURE, _text("b")]), _answer("")]},
    "clips": {"messages": [_user([{"text": "a"}, _CLIP, _PICTURE, {"video": "b.mp4"}, {"text": "b"}]), _answer("c")]},
    "picture by url": {"messages": [_user([{"type": "image_url", "image_url": {"url": "a.png"}}, {"text": "?"}])]},
    "reasoning in text": {
        "messages": [_ASK, _answer("<think>\nwhy\n</think>\n\nOld"), _ASK, _answer("<think>\nhow\n</think>\n\nNew")]
    },
    "tools": {"messages": [{"role": "system", "content": "Be kind."}, _ASK], "tools": _TOOLS},
    "tools, no system": {"messages": [_ASK, _answer("x")], "tools": _TOOLS},
    "calls": {
        "messages": [_ASK, _answer("Look:", tool_calls=_CALLS), *_RESULTS, _answer("", tool_calls=_CALLS), _RESULTS[0],
                     _answer("Done."), _ASK],
        "tools": _TOOLS,
    },
}  # fmt: skip
_THINKING: dict[str, dict[str, Any]] = {
    "late system": {"messages": [_ASK, {"role": "system", "content": "Be kind."}, _ASK]},
    "reasoning_content": {
        "messages": [_ASK, _answer("Old", reasoning_content="why"), _ASK,
                     _answer("\nx", reasoning_content="\nhow\n", tool_calls=_CALLS), *_RESULTS, _answer("New")]
    },
    "wrapped tool response": {
        "messages": [_ASK, _answer("a", reasoning_content="b"), _user("<tool_response>\n1\n</tool_response>"),
                     _answer("c")]
    },
}  # fmt: skip
PROBES = {"instruct": _COMMON, "thinking": {**_COMMON, **_THINKING}}
"""Conversations that together reach every branch of the templates, for each dialect."""


_MAX_LINES = 200_000
"""Lines of compiled template, and of the filters it calls, for one conversation; Qwen's take under 2,000."""
_MAX_BYTES = 1 << 30
_MAX_FACTOR = 100_000
_MAX_CHARACTERS = 1_000_000


def find_template(model_path: str | Path) -> tuple[str, str]:
    """Return (text of the chat template, its file). Raise ValueError when the checkpoint has none."""
    folder = Path(model_path)
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8"), str(file)
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        try:
            template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file}: not a JSON object ({error}); copy the file again") from None
        if isinstance(template, list):
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        if isinstance(template, str):
            return template, str(file)
    places = "chat_template.jinja, chat_template.json, or chat_template in tokenizer_config.json"
    raise ValueError(f"{folder}: no chat template ({places}); copy it from the checkpoint")


def render_template(template: str, messages: list[Any], tools: list[Any] | None, generation_prompt: bool) -> str:
    """Render with the template itself, in a sandbox set up as in transformers. Raise jinja2.TemplateError."""
    return _compile(template).render(messages=messages, tools=tools, add_generation_prompt=generation_prompt)


@lru_cache(maxsize=4)  # compiling takes 15 ms, and a check renders 25 times
def _compile(template: str) -> "Template":
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    class Generation(Extension):
        """Render what is between `{% generation %}` marks as if they were not there.

        Training templates for transformers and TRL have them around what is trained; here that is a rule of our own.
        """

        tags = {"generation"}  # noqa: RUF012  (jinja's own form)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

        def content(self, caller: Any) -> str:
            return caller()

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuse products that take more than a line of a template should."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or max(_size(left), _size(right)) > _MAX_FACTOR:
                raise TemplateError(f"{operator} of large values")
            return super().call_binop(context, operator, left, right)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    sandbox.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    sandbox.globals["raise_exception"] = refuse
    return sandbox.from_string(template)


def _size(value: Any) -> int:
    """Return what a product grows by: the value of an integer, the length of a text or a list."""
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str | list | tuple) else 0


@contextlib.contextmanager
def _bounded(*, counts_lines: bool) -> Iterator[None]:
    """Raise MemoryError for much memory, and TemplateError after so many lines of compiled template.

    The limit on memory is one of the process, so it is raised again at once; there is none where /proc is missing.
    """
    import resource

    from jinja2 import TemplateError

    left = _MAX_LINES

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TemplateError(f"it takes more than {_MAX_LINES:,} lines")
        return count

    before, limits = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.is_file():
        most = int(status.read_text().split()[0]) * resource.getpagesize() + _MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most if limits[0] < 0 else min(most, limits[0]), limits[1]))
    if counts_lines:
        sys.settrace(count)
    try:
        yield
    finally:
        if counts_lines:
            sys.settrace(before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@lru_cache(maxsize=8)  # a run opens its checkpoint several times
def check_template(template: str, where: str = "chat_template") -> str:
    """Return the dialect of a checkpoint's template: 'instruct' or 'thinking'.

    Every probe is rendered by the template and by our rules, with and without the generation prompt. Raise ValueError
    that shows where the two first differ, or why the template cannot be rendered: it is code from elsewhere, which may
    raise anything, or run without end.
    """
    from jinja2 import TemplateError

    def render(messages: list[Any], tools: list[Any] | None, generation_prompt: bool) -> str:
        try:
            if len(template) > _MAX_CHARACTERS:
                raise TemplateError(f"it has {len(template):,} characters, more than {_MAX_CHARACTERS:,}")
            with _bounded(counts_lines=False):
                _compile(template)
            with _bounded(counts_lines=True):
                return render_template(template, messages, tools, generation_prompt)
        except Exception as error:  # the expressions of a template raise what Python raises, besides TemplateError
            reason = str(error) or type(error).__name__
            raise ValueError(f"{where}: cannot be rendered ({reason}); copy the template again") from None

    prompt = render([_ASK], None, True)
    dialect = "thinking" if prompt.endswith("<think>\n") else "instruct"
    for name, probe in PROBES[dialect].items():
        sample = parse_sample(probe)
        for generation_prompt in (False, True):
            theirs = render(probe["messages"], probe.get("tools"), generation_prompt)
            ours = as_text(DIALECTS[dialect](sample.messages, sample.tools, generation_prompt=generation_prompt))
            if theirs != ours:
                raise ValueError(
                    f"{where}: probe {name!r} renders {_around(theirs, ours)}, but Qwen3-VL {dialect} renders "
                    f"{_around(ours, theirs)}; use the template this checkpoint was published with"
                )
    return dialect


def _around(text: str, other: str) -> str:
    """Quote the text around the first character that differs from other."""
    index = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, index - 20) : index + 20])
