"""One turn of a conversation, in any dialect -> checked `Turn`s.

OpenAI's {"role", "content"}, ShareGPT's {"from", "value"}, and Anthropic's blocks, whose results of tools are turns of
their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.keys import Keys
from qwen3vl_train.data.rows.parts import Slot, is_part_list, read_part
from qwen3vl_train.data.rows.sample import ROLES, ImagePart, Message, Part, TextPart, ToolCall, VideoPart
from qwen3vl_train.data.rows.values import check_json, check_text, is_number, parse_json, shown, wrong_type

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
"""The speakers of all dialects, in lower case."""
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
"""Of the loss of a turn that is trained. Far beyond any use, and far within what float32 sums hold."""
_WEIGHTS = f"0, or a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:,.0f}"
_CALLERS = ("function_call", "tool_call")
_KNOWN = frozenset({
    "role", "from", "content", "value", "loss", "loss_weight", "weight", "tool_calls", "function_call",
    "reasoning_content", "reasoning", "thinking", "text", "refusal", "image", "images", "video", "videos", "audio",
    "audios", "objects",
})  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One turn before the row's listed media are inserted.

    typed: its content was written as a list of parts, in which a text is a text.
    where: its position in the row, such as "messages[0]".
    """

    role: str
    content: tuple[Part | Slot, ...]
    where: str
    typed: bool = False
    loss_weight: float = 0.0
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None

    def message(self) -> Message:
        """Return the turn as a message. Raise RowFault where a part has no medium, or the template would drop one."""
        for index, part in enumerate(self.content):
            if isinstance(part, Slot):
                where, kind = f"{self.where}.content[{index}]", part.kind
                fault = f'{where}: no key {kind!r} for type {kind!r}; write {{"type": "{kind}", "{kind}": ...}}'
                raise RowFault(fault, kind="missing_field")
            if self.role in ("system", "assistant") and not isinstance(part, TextPart):
                what = "an image" if isinstance(part, ImagePart) else "a video"
                fault = f"the {self.role} message has {what}, which the template drops; move it to a user message"
                raise RowFault(f"{self.where}: {fault}", kind="dropped_by_template")
        content = tuple(part for part in self.content if isinstance(part, TextPart | ImagePart | VideoPart))
        return Message(self.role, content, self.loss_weight, self.tool_calls, self.reasoning)


def read_turns(turns: Any, name: str, ignored: list[str]) -> list[Turn]:
    """Read a row's list of turns.

    name: the key that holds them, for messages.
    ignored: takes the keys that nothing reads, as "turn.recipient".
    Raise RowFault.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json(turns, name)
    if turns is None:
        fault = 'no messages; write {"messages": [{"role": ..., "content": ...}, ...]}'
        raise RowFault(fault, kind="missing_field")
    if not isinstance(turns, list):
        raise wrong_type(name, turns, f", not a list; write a list of {name if name == 'messages' else 'turns'}")
    if not turns:
        raise RowFault(f"{name} is empty; write at least a question and an answer", kind="missing_field")
    return [read for index, turn in enumerate(turns) for read in read_turn(turn, f"{name}[{index}]", ignored)]


def read_turn(turn: Any, where: str, ignored: list[str]) -> list[Turn]:
    """Return one turn; for an Anthropic message with results of tools, these first, each as a turn of the tool."""
    if not isinstance(turn, dict):
        raise wrong_type(where, turn, ", not an object; write role and content")
    keys = Keys(turn, where)
    speaker = keys.take("role", "from")
    if speaker is None:
        raise RowFault(f"{where}: no role; write one of {', '.join(ROLES)}", kind="missing_field")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RowFault(f"{where}: unknown role {str(speaker)[:50]!r}; use {', '.join(ROLES)}")
    key = "value" if keys.holds("value") or "content" not in turn else "content"
    content = keys.take("content", "value")
    content = turn.get(key) if content is None else content  # an empty text is a text
    if keys.all_read() and isinstance(content, str) and speaker.lower() not in _CALLERS:  # most turns
        parts, typed = _content(content, f"{where}.{key}", role, ignored)
        return [Turn(role, parts, where, typed, 1.0 if role == "assistant" else 0.0)]
    keys.mark_read("name", "tool_call_id")
    calls, call = keys.take("tool_calls"), keys.take("function_call")
    if call is not None:
        calls = [call] if calls is None else [*calls, call] if isinstance(calls, list) else calls
    if speaker.lower() in _CALLERS:
        if calls is not None:
            fault = f"{where}: a turn of {speaker} has its call as content, and tool_calls beside it; keep one of them"
            raise RowFault(fault, kind="conflicting_fields")
        found = parse_json(content, f"{where}.{key}") if isinstance(content, str) else content
        calls, content = found if isinstance(found, list) else [found], ""
    reasoning = keys.take("reasoning_content", "reasoning", "thinking")
    loss_weight = _loss_weight(keys, role, where)
    ignored += [f"turn.{name}" for name in keys.close(_KNOWN, f"a turn of the {role}")]
    blocks = _Blocks(content, where, ignored) if isinstance(content, list) else None
    if blocks is not None:
        content, reasoning = blocks.parts, blocks.reasoning or reasoning
        calls = [*(calls if isinstance(calls, list) else []), *blocks.calls] if blocks.calls else calls
    tool_calls = _tool_calls(calls, role, where)
    if content is None and not tool_calls:
        raise RowFault(f"{where}: no content; write text or a list of parts", kind="missing_field")
    if reasoning is not None:
        check_text(reasoning, f"{where}.reasoning_content")
        if role != "assistant":
            raise RowFault(f"{where}: reasoning_content in a {role} message; only assistant messages have it")
    parts, typed = _content(content, f"{where}.{key}", role, ignored)
    results = blocks.results if blocks is not None else []
    if results and not parts:
        return results
    return [*results, Turn(role, parts, where, typed, loss_weight, tool_calls, reasoning)]


def _content(content: Any, where: str, role: str, ignored: list[str]) -> tuple[tuple[Part | Slot, ...], bool]:
    """Return the parts of a content, and whether they were written as parts."""
    if content is None:
        return (), False
    if isinstance(content, str):
        typed = is_part_list(content, only_text=role not in ("user", "tool"))
        if typed is None:
            return ((TextPart(check_text(content, where)),) if content else ()), False
        content = typed
    if not isinstance(content, list):
        raise wrong_type(where, content, "; write text or a list of parts")
    return tuple(read_part(part, f"{where}[{index}]", ignored) for index, part in enumerate(content)), True


class _Blocks:
    """A list of parts, with Anthropic's blocks of tools and thinking taken out.

    parts: the other parts, as they were written.
    calls: {"name", "arguments"} of tool_use blocks.
    results: turns of the tool, from tool_result blocks.
    reasoning: the text of thinking blocks, None where there is none.
    """

    def __init__(self, content: list[Any], where: str, ignored: list[str]) -> None:
        self.parts: list[Any] = []
        self.calls: list[dict[str, Any]] = []
        self.results: list[Turn] = []
        self.reasoning: str | None = None
        for index, block in enumerate(content):
            kind = block.get("type") if isinstance(block, dict) else None
            here = f"{where}.content[{index}]"
            if kind == "tool_use":
                self.calls.append({"name": block.get("name"), "arguments": block.get("input") or {}})
            elif kind == "tool_result":
                if self.parts:
                    fault = f"{here}: a tool_result after other parts, before which it is read; split the turn"
                    raise RowFault(fault, kind="invalid_value")
                inner, typed = _content(block.get("content"), f"{here}.content", "tool", ignored)
                self.results.append(Turn("tool", inner, here, typed))
            elif kind == "thinking":
                self.reasoning = (self.reasoning or "") + check_text(block.get("thinking"), f"{here}.thinking")
            else:
                self._add(block, here)

    def _add(self, block: Any, where: str) -> None:
        if self.calls:
            fault = f"{where}: a part after a call, which the template writes before it; split the turn"
            raise RowFault(fault, kind="dropped_by_template")
        self.parts.append(block)


def _loss_weight(keys: Keys, role: str, where: str) -> float:
    loss, given = keys.get("loss"), {}
    for name in ("loss_weight", "weight"):
        if (value := keys.get(name)) is not None:
            given[name] = value
    if loss is not None and not isinstance(loss, bool):
        raise wrong_type(f"{where}.loss", loss, "; write true or false")
    if len(given) > 1:
        fault = f"{where}: loss_weight and weight are both given; keep one of them"
        raise RowFault(fault, kind="conflicting_fields")
    weight = None
    for name, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise wrong_type(f"{where}.{name}", weight, f"; write {_WEIGHTS}")
        if not is_number(weight) or not (weight == 0 or MIN_WEIGHT <= weight <= MAX_WEIGHT):
            raise RowFault(f"{where}.{name} is {shown(weight)}; write {_WEIGHTS}")
    if role != "assistant" and (loss or weight):
        raise RowFault(f"{where}: loss on a {role} message; only assistant messages are trained")
    if loss is False and weight:
        fault = f"{where}: loss is false but {next(iter(given))} is {weight}; remove one of them"
        raise RowFault(fault, kind="conflicting_fields")
    if role != "assistant" or loss is False:
        return 0.0
    return 1.0 if weight is None else float(weight)


def _tool_calls(calls: Any, role: str, where: str) -> tuple[ToolCall, ...]:
    """Read OpenAI's calls. Arguments written as text must be JSON: the template writes them as they are."""
    if not calls:
        return ()
    if role != "assistant":
        raise RowFault(f"{where}: tool_calls in a {role} message; only assistant messages call tools")
    if not isinstance(calls, list):
        raise wrong_type(f"{where}.tool_calls", calls, ", not a list; write a list of calls")
    parsed = []
    for index, call in enumerate(calls):
        here = f"{where}.tool_calls[{index}]"
        call = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            fault = f'{here}: no name and arguments; write {{"name": ..., "arguments": {{...}}}}'
            raise RowFault(fault, kind="missing_field")
        arguments = call["arguments"]
        if isinstance(arguments, str):
            parse_json(arguments, f"{here}.arguments")
        check_json(arguments, here)
        parsed.append(ToolCall(check_text(call["name"], f"{here}.name"), arguments))
    return tuple(parsed)


def untrained(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with no loss on any."""
    return [Turn(t.role, t.content, t.where, t.typed, 0.0, t.tool_calls, t.reasoning) for t in turns]


def read_tools(keys: Keys) -> tuple[Any, ...]:
    """Return descriptions of tools in OpenAI's form, from that, from its older `functions`, or from Anthropic's."""
    tools, functions = keys.get("tools"), keys.take("functions")
    tools = (parse_json(tools, "tools") if tools.strip() else None) if isinstance(tools, str) else tools
    functions = parse_json(functions, "functions") if isinstance(functions, str) else functions
    if tools is None and isinstance(functions, list):
        tools = [{"type": "function", "function": function} for function in functions]
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("tools is not a list of objects; write OpenAI function descriptions", kind="wrong_type")
    check_json(tools, "tools")
    return tuple(map(_openai_tool, tools))


def _openai_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "input_schema" not in tool:
        return tool
    function = {key: tool[key] for key in ("name", "description") if key in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}
