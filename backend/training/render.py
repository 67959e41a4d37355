"""A dialogue as text, piece by piece, with what is learned marked."""

from __future__ import annotations

from random import Random
from typing import Any

from flash_moe.chat.template import Template
from flash_moe.synth.tokenizer import TEMPLATE
from training.dialogue import Dialogue, Message

OPENING = {
    True: "<|im_start|>assistant\n<think>\n",
    False: "<|im_start|>assistant\n<think>\n\n</think>\n\n",
}


class ChatRenderer:
    def __init__(self) -> None:
        self.template = Template(TEMPLATE, {})

    def pieces(self, dialogue: Dialogue, random: Random | None = None) -> list[tuple[str, bool]]:
        """The assistant's turns after the last question are learned: what was thought before it is
        not shown. With `random` the conversation may end at an earlier question."""
        messages, thinking = dialogue.messages, dialogue.thinking
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if random is not None and len(asked) > 1 and random.random() < 0.4:
            at = random.randrange(len(asked) - 1)
            messages = messages[: asked[at + 1]]
            asked = asked[: at + 1]
            thinking = any("reasoning_content" in m for m in messages[asked[-1] :])
        done, found = "", []
        for i in range(asked[-1] + 1, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            prompt = self._render(messages[:i], dialogue.tools, thinking)
            whole = self._render(messages[: i + 1], dialogue.tools, thinking)
            whole = whole.removesuffix(OPENING[thinking])
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(f"the template does not go on where it was: {messages}")
            found += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return found

    def _render(self, messages: list[Message], tools: list[dict[str, Any]], thinking: bool) -> str:
        return self.template.render(messages, tools=tools or None, enable_thinking=thinking)


def rendered(renderer: ChatRenderer, dialogue: Dialogue) -> str:
    return "".join(text for text, _ in renderer.pieces(dialogue))
