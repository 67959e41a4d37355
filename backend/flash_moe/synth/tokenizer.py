"""The tokenizer of synthetic models: byte-level, with Qwen's special tokens and chat behaviour.

Small and trained on the spot: the 256 bytes, words from the paragraph below, and the special
tokens. The template is our own text with Qwen3.5's behaviour: tools in the system turn, earlier
thoughts dropped, the reply begun inside `<think>` if thinking is on. It is off by default, because
a random or very small model has no use for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flash_moe.errors import OptionError

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
# How many of them Qwen marks as special, so that decoding leaves them out.
HIDDEN = 3

TEXT = """
A mixture of experts is a model of many small networks and a router. For every token the router
looks at the hidden state and picks a few of the experts; the others stay asleep, and on a disk
they may sleep for free. A token then costs what its experts cost: a few megabytes of reading in
every layer, one wait for the router, two or three products of matrices. The rest of the model is
small and always there: attention, the shared expert, the table of words. That is why a machine
with little memory can run a model with a great many weights, if its disk is quick and nothing is
read twice. The page cache of the operating system keeps what was used lately, and does it well.
Weights are stored in four bits or in two, a scale and a bias for each group of sixty four, and
are made into numbers again where they meet the vector. Prompts are read in chunks, so that each
expert is fetched once for many tokens. When the answer begins, words come one after the other,
each of them a short walk through every layer of the house.
"""

TEMPLATE = Path(__file__).with_name("template.jinja").read_text("utf-8")


@dataclass(frozen=True, slots=True)
class SynthTokenizer:
    json: str
    config: dict[str, Any]
    stop_tokens: list[int]
    readable: tuple[int, ...]
    size: int


@cache
def make_tokenizer() -> SynthTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    tokenizer.add_special_tokens(SPECIAL[:HIDDEN])
    tokenizer.add_tokens(SPECIAL[HIDDEN:])
    ids = {token: number for token, number in tokenizer.get_vocab().items() if token in SPECIAL}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 262144,
    }
    size = tokenizer.get_vocab_size()
    return SynthTokenizer(
        json=tokenizer.to_str(),
        config=config,
        stop_tokens=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        readable=tuple(i for i in range(size) if _is_word(tokenizer, i, set(ids.values()))),
        size=size,
    )


def require_vocabulary(size: int) -> None:
    needed = make_tokenizer().size
    if size < needed:
        raise OptionError(
            f"vocabulary={size}: the tokenizer alone has {needed} tokens. Choose at least as many."
        )


def _is_word(tokenizer: Tokenizer, token: int, special: set[int]) -> bool:
    text = tokenizer.decode([token])
    return token not in special and text.startswith(" ") and text.strip().isalpha()
