"""Cuts depend only on the text before them, and work with the templates of every family."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from flash_moe.chat.template import Template
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.prefix.boundaries import (
    SPACING,
    TAIL,
    ChunkEnds,
    TurnMarks,
    chunk_ends,
    find_turn_marks,
)
from flash_moe.synth.tokenizer import TEMPLATE, make_tokenizer
from tests.prefix.conversations import MARKS, conversations, words

chunks = st.integers(1, 200)


@given(conversations(), chunks)
def test_chunks_cover_the_prompt_and_none_is_too_long(prompts: list[list[int]], chunk: int) -> None:
    for prompt in prompts:
        cuts = chunk_ends(prompt, MARKS, chunk)
        ends = [0, *cuts.after(0)]
        assert all(0 < end - start <= chunk for start, end in pairwise(ends))
        assert 1 <= len(prompt) - ends[-1] <= TAIL
        assert set(cuts.saved) <= set(cuts.ends)
        assert all(end - start >= min(SPACING, chunk // 2) for start, end in pairwise(cuts.ends))


@given(conversations(), st.lists(words), chunks)
def test_later_text_moves_no_earlier_cut(
    prompts: list[list[int]], more: list[int], chunk: int
) -> None:
    """So a prompt that continues another one finds the state where it was saved."""
    prompt = prompts[-1]
    cuts = chunk_ends(prompt, MARKS, chunk)
    for end in cuts.saved:
        if prompt[end : end + 2] in ([1, 2], [1, 3]):
            later = chunk_ends([*prompt[: end + 2], *more, 5], MARKS, chunk)
            assert [place for place in later.ends if place <= end] == [
                place for place in cuts.ends if place <= end
            ]


@given(conversations(), chunks, st.data())
def test_after_a_saved_state_the_same_cuts_remain(
    prompts: list[list[int]], chunk: int, data: st.DataObject
) -> None:
    cuts = chunk_ends(prompts[-1], MARKS, chunk)
    whole = cuts.after(0)
    start = data.draw(st.sampled_from([0, *cuts.ends]))
    assert cuts.after(start) == [end for end in whole if end > start]


def test_where_a_chat_is_cut() -> None:
    system, question, answer = list(range(100, 200)), list(range(200, 240)), list(range(300, 350))
    prompt = [1, 5, *system, 4, 1, 3, *question, 4, 1, 2, *answer, 4, 1, 3, *question, 4, 1, 2, 7]
    # Instructions end at 103; the first question at 146, the second at 242.
    assert chunk_ends(prompt, MARKS, 512) == ChunkEnds((103, 146, 242), (103, 242), 245)
    assert chunk_ends(prompt, MARKS, 60) == ChunkEnds((60, 103, 146, 206, 242), (103, 242), 245)
    assert chunk_ends(prompt, TurnMarks(), 100) == ChunkEnds((100, 200), (200,), 245)
    assert chunk_ends(prompt, TurnMarks(), 512) == ChunkEnds((), (), 245)


# Templates by how turns open; SPECIAL are texts that are single tokens.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEADERS = (
    "<B>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
)
TURNS = (
    "<B>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
)
ROLES = (
    "<B>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}<E>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
INST = (
    "<B>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}<E>{% endif %}{% endfor %}"
)
SPECIAL = [
    *("<B>", "<E>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|User|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|Assistant|>", "[INST]", "[/INST]"),
]
FAMILIES = {
    "ours": (TEMPLATE, "", "<|im_start|>a", "<|im_start|>u"),
    "chatml": (CHATML, "<|im_start|>assistant\n", "<|im_start|>a", "<|im_start|>u"),
    "headers": (
        HEADERS,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>a",
        "<|start_header_id|>u",
    ),
    # These refuse two questions in a row, so the user's opening cannot be learned.
    "turns": (TURNS, "<start_of_turn>model\n", "<start_of_turn>m", None),
    "roles": (ROLES, "<|Assistant|>", "<|Assistant|>", "<|User|>"),
    "instructions": (INST, "", "[/INST]", None),
}


def chat_tokenizer(template: str | None) -> ChatTokenizer:
    tokenizer = Tokenizer.from_str(make_tokenizer().json)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return ChatTokenizer(
        tokenizer, None if template is None else Template(template, {}), frozenset()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_turn_marks_of_templates(family: str) -> None:
    source, opening, assistant, user = FAMILIES[family]
    if opening:
        source += "{% if add_generation_prompt %}" + opening + "{% endif %}"
    tokenizer = chat_tokenizer(source)
    marks = find_turn_marks(tokenizer)
    texts = [
        tokenizer.tokenizer.decode(list(mark), skip_special_tokens=False)
        for mark in (marks.assistant, marks.user)
    ]
    # A token may be a whole word, so a mark can be a little longer than the distinctive text.
    assert texts[0].startswith(assistant)
    assert user is None or texts[1].startswith(user)
    # A conversation continues from where its first turn was cut.
    long = "many words " * 40
    first = [{"role": "user", "content": long}]
    second = [*first, {"role": "assistant", "content": "A reply."}, *first]
    one, two = (tokenizer.encode_chat(messages) for messages in (first, second))
    end = chunk_ends(one, marks, 512).ends[-1]
    assert len(one) - end <= TAIL
    assert one[:end] == two[:end]
    assert chunk_ends(two, marks, 512).ends[0] == end


@pytest.mark.parametrize(
    "template", [None, "{{ messages[0].content }}", "{{ raise_exception('') }}"]
)
def test_templates_without_openings_are_cut_by_length_alone(template: str | None) -> None:
    assert find_turn_marks(chat_tokenizer(template)) == TurnMarks()
