"""Chat templates: ours behaves like Qwen3.5's, any other like in transformers, none can harm."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from flash_moe.built_in import BUILT_IN, NAME
from flash_moe.chat.template import Template
from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.errors import CheckpointError, OptionError
from flash_moe.synth.tokenizer import TEMPLATE

Message = dict[str, Any]
GOLDEN = Path(__file__).parents[1] / "golden" / "conversations.json"
SPECIAL = {"bos_token": "<B>", "eos_token": "<E>"}
SYNTHETIC = Template(TEMPLATE, SPECIAL)

# The features that templates of well-known models use, in one.
FEATURES = """\
{%- if not tools is defined %}undefined{% endif -%}
{{- bos_token }}{{ 'none' if tools is none else tools | length }}{{ documents is none -}}
{% for message in messages %}
    {% if loop.index0 > 6 %}{% break %}{% endif %}
    {{ message.role }}:{{ message | tojson }}
    {{ message.reasoning_content }}{{ message.thinking }}
    {{ message | tojson(indent=2) }}{{ message | tojson(separators=(',', ':'), sort_keys=true) }}
    {% generation %}{% set seen = message.content %}{{ seen }}{{ eos_token }}{% endgeneration %}
    {{ seen }}
{% endfor %}
{%- set state = namespace(count=0) %}{% for m in messages %}
{% set state.count = state.count + 1 %}{% endfor %}
{{ state.count }}{{ messages | map(attribute='role') | join(',') }}
{% if add_generation_prompt %}go{% endif %}
{{ strftime_now('%d.%m.%Y') }} {{ enable_thinking }}
"""

texts = st.text(max_size=12) | st.sampled_from(
    ["", " x\n", "<|im_end|>", "{{ 1 }}", "a'\"b", "é漢"]
)
calls = st.fixed_dictionaries(
    {
        "id": texts,
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {
                "name": texts,
                "arguments": st.dictionaries(texts, texts | st.integers() | st.none(), max_size=2),
            }
        ),
    }
)
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": texts}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": texts},
        optional={"reasoning_content": texts, "tool_calls": st.lists(calls, max_size=2)},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "name": texts, "content": texts}),
)
tool_lists = st.lists(st.dictionaries(texts, texts, max_size=2), max_size=2)
variables = st.fixed_dictionaries(
    {}, optional={"enable_thinking": st.booleans(), "tools": tool_lists}
)


def as_in_transformers(source: str, chat: list[Message], **variables: Any) -> str:
    rendered, _ = render_jinja_template(
        conversations=[chat],
        chat_template=source,
        add_generation_prompt=True,
        **SPECIAL,
        **variables,
    )
    return str(rendered[0])


@pytest.mark.parametrize("source", [TEMPLATE, FEATURES], ids=["synthetic", "features"])
@settings(max_examples=120, deadline=None)
@given(chat=st.lists(messages, min_size=1, max_size=6), variables=variables)
def test_any_conversation_renders_as_in_transformers(
    source: str, chat: list[Message], variables: dict[str, Any]
) -> None:
    before = copy.deepcopy(chat)
    rendered = Template(source, SPECIAL).render(chat, **variables)
    assert rendered == as_in_transformers(source, chat, **variables)
    assert chat == before


@pytest.mark.parametrize("number", range(30))
def test_golden_conversations_are_rendered_to_the_byte(number: int) -> None:
    """As transformers rendered them once: tests/golden/make_conversations.py."""
    golden = json.loads(GOLDEN.read_text("utf-8"))[number]
    tokenizer = load_tokenizer(BUILT_IN[NAME])
    variables = {key: golden[key] for key in ("tools", "enable_thinking")}
    text = tokenizer.render_chat(
        golden["messages"], add_generation_prompt=not golden["finished"], **variables
    )
    assert text.encode() == golden["text"].encode()
    assert tokenizer.encode_rendered(text) == golden["ids"]


def test_a_checkpoint_gives_the_token_ids_of_transformers(demo_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(demo_folder)
    ours = load_tokenizer(demo_folder)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me about experts. 🦙 e\u0301"},
        {"role": "assistant", "content": "They sleep.", "reasoning_content": "hm"},
        {"role": "user", "content": "  And then?\n"},
    ]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(chat) == expected


# The synthetic template ----------------------------------------------------------------------

SYSTEM: Message = {"role": "system", "content": " Be brief. "}
USER: Message = {"role": "user", "content": "Hello"}
THOUGHT: Message = {"role": "assistant", "content": "Hi", "reasoning_content": "greet"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "look it up",
    "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
    ],
}
RESULT: Message = {"role": "tool", "name": "add", "content": "3"}
OPENED = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_the_system_prompt_comes_first() -> None:
    assert SYNTHETIC.render([SYSTEM, USER]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n" + CLOSED
    )


def test_tools_share_the_system_turn() -> None:
    text = SYNTHETIC.render([SYSTEM, USER], tools=[{"name": "add"}, {"name": "<b>"}])
    system, rest = text.split("<|im_end|>", 1)
    assert '<tools>\n{"name": "add"}\n{"name": "<b>"}\n</tools>' in system
    assert system.endswith("\n\nBe brief.")
    assert "system" not in rest


@pytest.mark.parametrize(
    ("variables", "end"),
    [
        ({}, CLOSED),
        ({"enable_thinking": True}, OPENED),
        ({"enable_thinking": False}, CLOSED),
    ],
)
def test_thinking_is_off_unless_it_is_on(variables: dict[str, Any], end: str) -> None:
    assert SYNTHETIC.render([USER], **variables).endswith("Hello<|im_end|>\n" + end)


def test_only_thoughts_after_the_last_question_stay() -> None:
    text = SYNTHETIC.render([USER, THOUGHT, USER, CALL, RESULT])
    assert "greet" not in text
    assert "<|im_start|>assistant\nHi<|im_end|>" in text
    assert "<think>\nlook it up\n</think>\n\n" in text


def test_calls_and_results_are_written_as_the_model_writes_them() -> None:
    text = SYNTHETIC.render([USER, CALL, RESULT])
    assert (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=b>\ntwo\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n" + CLOSED
    ) in text


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert SYNTHETIC.render([{"role": "user", "content": parts}]) == SYNTHETIC.render([USER])


def test_a_template_can_refuse_a_conversation() -> None:
    with pytest.raises(OptionError, match=r"conversation: There is no role stranger\.$"):
        SYNTHETIC.render([{"role": "stranger", "content": ""}])


# Hostile and broken templates --------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ [].__class__.__base__.__subclasses__() }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__closure__[0] }}",
        "{{ self.__init__.__globals__.x }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ namespace(f='{0.__class__.x}'.format).f(0) }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    chat = [dict(USER)]
    with pytest.raises(OptionError, match="rejects this conversation"):
        Template(source, {}).render(chat)
    assert chat == [USER]


@pytest.mark.parametrize("source", ["{{ ''.__class__ }}", "{{ messages.__class__ }}"])
def test_attributes_that_the_sandbox_hides_are_empty(source: str) -> None:
    assert Template(source, {}).render([USER]) == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' + 1 }}", "TypeError: can only concatenate"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages[9].role }}", "has no element 9"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[0]() }}", "TypeError: 'dict' object is not callable"),
        ("{{ range(10 ** 9) }}", "OverflowError: Range too big"),
        ("{{ messages[0].content | int(base=99) + 'x' }}", "TypeError|ValueError"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError: "),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("{{ raise_exception('no\n  system prompt.') }}", "conversation: no system prompt"),
        ("{{ raise_exception('') }}", "conversation: no reason given"),
    ],
)
def test_templates_that_fail_give_one_line(source: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        Template(source, {}).render([USER])
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.endswith(".")
    assert not text.endswith("..")


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% nonsense %}", "{{ x | no_filter }}"])
def test_a_text_that_is_not_a_template(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template is broken"):
        Template(source, {})
