"""Make the golden conversations: 30 held-out ones of the built-in model, rendered by transformers
with and without the reply.

Run once, by hand: python tests/golden/make_conversations.py
It writes conversations.json beside itself.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from transformers import AutoTokenizer

from flash_moe.built_in import BUILT_IN, HELD_OUT, NAME

TARGET = Path(__file__).with_name("conversations.json")


def main() -> None:
    lines = (HELD_OUT / "dialogues.jsonl").read_text("utf-8").splitlines()
    kinds = groupby(map(json.loads, lines), key=lambda dialogue: dialogue["kind"])
    # The longest of each kind: several turns, tools with their results, instructions.
    longest = [
        dialogue
        for _, dialogues in kinds
        for dialogue in sorted(dialogues, key=lambda d: -len(d["messages"]))[:4]
    ][-30:]
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN[NAME])
    golden = []
    for number, dialogue in enumerate(longest):
        finished = number % 3 == 0
        messages = dialogue["messages"] + ([dialogue["reply"]] if finished else [])
        variables = {"tools": dialogue["tools"] or None, "enable_thinking": dialogue["thinking"]}
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not finished, **variables
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        golden.append({"messages": messages, **variables, "finished": finished})
        golden[-1] |= {"text": text, "ids": ids}
    TARGET.write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
