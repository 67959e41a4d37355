"""What llm-flash-moe is and how it is used: each fact has one answer and many ways to ask."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from training.dialogue import Dialogue, assistant, reserved, system, user

P = "llm-flash-moe"
WHAT = ("What is {}?", "what is {}", "What's {}?", "Explain {}.", "Tell me about {}.", "{}?",
        "What does {} mean?", "Can you explain {}?", "Describe {}.", "I do not know {}. What is it?",
        "In short, what is {}?", "Please explain {}.")  # fmt: skip
COMMAND = ("What does `{}` do?", "what does {} do", "What is {} for?", "Explain the command {}.",
           "When do I use `{}`?", "{}?", "What happens with {}?", "Tell me about `{}`.")  # fmt: skip
OPTION = ("What does the option {} do?", "What is -o {} for?", "Explain the option `{}`.",
          "what does -o {} do", "How do I use the option {}?", "When do I set {}?")  # fmt: skip
HOW = ("How do I {}?", "how do i {}", "How can I {}?", "What is the command to {}?", "I want to {}.",
       "Tell me how to {}.", "What must I type to {}?", "Is there a way to {}?")  # fmt: skip
WHY = ("Why {}?", "why {}", "Can you say why {}?", "Tell me why {}.", "I wonder why {}.",
       "For what reason {}?")  # fmt: skip

# Ways to ask, subjects that fill them, answer.
FACTS: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    (WHAT, (P, "this project", "the llm-flash-moe plugin"),
     "llm-flash-moe is a plugin for llm that runs Mixture-of-Experts models bigger than memory: the experts stay on the SSD and only those that a token needs are read."),
    (WHAT, ("a Mixture of Experts", "a mixture-of-experts model", "MoE", "an MoE model"),
     "A Mixture of Experts is a model whose layers have many small networks and a router. For each token the router picks a few experts; the others are not computed."),
    (WHAT, ("an expert", "a routed expert", "an expert in a MoE"),
     "An expert is one of many small feed-forward networks in a layer. The router sends a token to a few of them."),
    (WHAT, ("the router", "a router in a MoE", "routing"),
     "The router is a small matrix that scores all experts of a layer for a token. The best ones compute it, weighted by their scores."),
    (WHAT, ("the shared expert", "a shared expert"),
     "The shared expert is used by every token, so it stays in memory."),
    (WHAT, ("top-k routing", "K in a MoE", "top-4 routing", "K"),
     "Top-k routing uses the k experts with the highest scores for a token. With k=4 instead of 10 fewer bytes are read, and the result is less exact."),
    (WHAT, ("the bank", "the expert bank", "the bank in llm-flash-moe"),
     "The bank is the memory into which experts are read: aligned slots in two lanes, one filled while the other computes. It is a working set, not a cache."),
    (WHAT, ("the page cache", "the OS page cache"),
     "The page cache is memory in which the operating system keeps what was lately read from disk. llm-flash-moe relies on it instead of a cache of its own."),
    (WHAT, ("a pack", "a packed model", "a pack in llm-flash-moe"),
     "A pack is a copy of a checkpoint in which every expert is one aligned record, so that one expert is one read."),
    (WHAT, ("quantization", "4-bit quantization", "a 4-bit model"),
     "Quantization stores each weight in a few bits, with a scale and a bias for each group of 64 weights. Fewer bits take less space and are less exact."),
    (WHAT, ("2-bit quantization", "a 2-bit model", "2 bits a weight"),
     "With 2 bits a weight has four values for each group of 64, with a scale and a bias. It is half of what 4 bits take, and clearly less exact."),
    (WHAT, ("MLX", "mlx"), "MLX is Apple's array library for machine learning. llm-flash-moe computes with it on Metal, CUDA and the CPU."),
    (WHAT, ("mlx-lm",), "mlx-lm is a library of language models on MLX. llm-flash-moe uses its models and adds the streaming of experts."),
    (WHAT, ("llm", "Simon Willison's llm", "the llm tool"),
     "llm is Simon Willison's command line tool for language models. Plugins such as llm-flash-moe add models to it."),
    (WHAT, ("flash-moe-tiny", "the built-in model", "the tiny model"),
     "flash-moe-tiny is the small model that comes with llm-flash-moe. It knows Python's standard library and needs no download."),
    (WHAT, ("flash-moe-397b", "the flagship model", "Qwen3.5-397B-A17B"),
     "flash-moe-397b is Qwen3.5-397B-A17B: 60 layers with 512 experts each. Its experts are streamed from SSD and about 5.6 GB of weights stay in memory."),
    (WHAT, ("prefill", "prompt processing"),
     "Prefill computes the tokens of the prompt before the first word of the reply. It goes in chunks, and each expert is read once a chunk."),
    (WHAT, ("the resident weights", "resident memory"),
     "The resident weights are all but the routed experts: attention, shared experts, router and words. They stay in memory."),
    (WHAT, ("Metal", "a Metal kernel"), "Metal is Apple's interface to the GPU. The kernels of llm-flash-moe are written for it and also compile for CUDA."),
    (WHAT, ("the KV cache", "the state of a conversation"),
     "The state holds what the attention layers keep of the tokens read so far, so that they need not be computed again."),
    (WHAT, ("a gated delta-net", "a linear attention layer", "the gated delta rule"),
     "A gated delta-net is a layer with a state of fixed size instead of a growing cache. In Qwen3.5 three of four layers are such."),
    (COMMAND, ("llm flash-moe add", "llm flash-moe add PATH"), "`llm flash-moe add PATH` uses a checkpoint or a pack where it is, without a copy."),
    (COMMAND, ("llm flash-moe pack", "llm flash-moe pack SOURCE"), "`llm flash-moe pack SOURCE` writes a copy of a checkpoint whose experts are quicker to read."),
    (COMMAND, ("llm flash-moe models",), "`llm flash-moe models` lists the models that were added, packed or made here."),
    (COMMAND, ("llm flash-moe info", "llm flash-moe info NAME"), "`llm flash-moe info NAME` shows what a model is and what it needs: disk, memory and bytes a token."),
    (COMMAND, ("llm flash-moe remove", "llm flash-moe remove NAME"), "`llm flash-moe remove NAME` forgets a model. Only files that were made here are deleted."),
    (COMMAND, ("llm flash-moe path",), "`llm flash-moe path` prints the folder of a model, or the folder where everything is kept."),
    (COMMAND, ("llm flash-moe doctor", "doctor"), "`llm flash-moe doctor` says what computes the experts on this machine, why, and what would be faster."),
    (COMMAND, ("llm flash-moe synth", "synth"), "`llm flash-moe synth` makes a model of random weights, to try things out and to measure. Its replies are noise."),
    (COMMAND, ("llm flash-moe eval", "eval"), "`llm flash-moe eval NAME` measures how good a model is: perplexity, questions, JSON and tool calls."),
    (COMMAND, ("llm chat -m flash-moe-tiny", "llm chat"), "`llm chat -m NAME` starts a conversation with a model in the terminal."),
    (COMMAND, ("llm logs",), "`llm logs` shows the prompts and replies that llm has stored in its SQLite database."),
    (COMMAND, ("llm -c", "-c"), "`llm -c` continues the last conversation."),
    (COMMAND, ("make demo",), "`make demo` installs everything in a checkout and runs the built-in model."),
    (COMMAND, ("make test",), "`make test` runs lint, types and tests in a checkout."),
    (OPTION, ("experts",), "`-o experts K` sets how many experts a token uses in each layer. Fewer read less and are less exact."),
    (OPTION, ("runtime",), "`-o runtime` chooses what computes the experts: auto, metal, cuda, native or mlx."),
    (OPTION, ("stats",), "`-o stats 1` prints statistics to stderr after the reply."),
    (OPTION, ("max_tokens",), "`-o max_tokens N` sets the most tokens to generate."),
    (OPTION, ("temperature",), "`-o temperature T` sets how much chance there is in a reply. 0 always takes the likeliest token."),
    (OPTION, ("top_p",), "`-o top_p P` samples only from the likeliest tokens that together have the probability P."),
    (OPTION, ("top_k",), "`-o top_k K` samples only from the K likeliest tokens."),
    (OPTION, ("seed",), "`-o seed N` makes sampling repeatable."),
    (OPTION, ("stop",), "`-o stop TEXT` ends the reply where the text would come."),
    (HOW, ("install llm-flash-moe", "install the plugin", "install this", "get llm-flash-moe"),
     "Install it with `llm install llm-flash-moe`."),
    (HOW, ("install it for an NVIDIA GPU", "use llm-flash-moe with CUDA", "use my NVIDIA card"),
     "Install it with `llm install 'llm-flash-moe[cuda13]'`."),
    (HOW, ("add a model", "use a model that I downloaded", "use my own checkpoint"),
     "Use `llm flash-moe add PATH`. The checkpoint is used where it is."),
    (HOW, ("remove a model", "delete a model", "forget a model"), "Use `llm flash-moe remove NAME`."),
    (HOW, ("list my models", "see which models I have"), "Use `llm flash-moe models`."),
    (HOW, ("see how much memory a model needs", "see how big a model is"), "Use `llm flash-moe info NAME`."),
    (HOW, ("get a faster reply", "make it faster", "speed up llm-flash-moe"),
     "Use fewer experts with `-o experts 4`, pack the model, and leave memory free for the page cache. `llm flash-moe doctor` says more."),
    (HOW, ("get exact results", "get the same logits as mlx-lm"), "Use `-o runtime mlx`: on a CPU it is mlx-lm's arithmetic to the bit."),
    (HOW, ("check a pack", "verify a pack", "find out if a pack is damaged"), "Use `llm flash-moe info NAME --verify`."),
    (HOW, ("chat with a model", "start a chat"), "Use `llm chat -m NAME`."),
    (HOW, ("run the 397B model", "use flash-moe-397b", "get Qwen3.5-397B"),
     "`llm -m flash-moe-397b` prints the two commands that fetch and add it. It takes 223 GB of disk and about 6 GB of memory."),
    (WHY, ("are experts streamed from the SSD", "does llm-flash-moe read from disk", "does it stream the experts"),
     "A token needs only a few of the experts, so reading those from a fast SSD takes far less memory than keeping them all."),
    (WHY, ("is there no cache of its own", "does llm-flash-moe have no expert cache", "is the page cache used"),
     "The operating system's page cache keeps what was lately read already, and a second cache would only take memory from it."),
    (WHY, ("is a pack faster", "should I pack a model"), "In a pack one expert is one read instead of up to nine."),
    (WHY, ("is the first token slow", "does the first reply take long"),
     "Before the first word the prompt is computed, and its experts are read from disk if they are not in the page cache."),
    (("{}",), ("What is the licence of llm-flash-moe?", "Which licence has llm-flash-moe?", "Is llm-flash-moe open source?", "what license is it", "Under which licence is llm-flash-moe?", "Is this project free?", "licence of llm-flash-moe?", "What license does llm-flash-moe use?"),
     "llm-flash-moe is open source under the Apache 2.0 licence."),
    (("{}",), ("Which systems does llm-flash-moe run on?", "Does it run on Linux?", "Does llm-flash-moe run on a Mac?", "Does llm-flash-moe need a GPU?", "What hardware do I need?", "On which computers does it run?", "Does it work without a GPU?", "Which platforms are supported?"),
     "It runs on macOS with Apple Silicon and on Linux, on the CPU or with an NVIDIA GPU."),
    (("{}",), ("Which Python do I need?", "What Python version does llm-flash-moe need?", "Does it work with Python 3.10?", "python version for llm-flash-moe", "Which Python versions are supported?", "Do I need Python 3.12?", "What Python is required?", "minimum Python version?"),
     "It needs Python 3.11 or newer."),
    (("{}",), ("How much memory does the 397B need?", "How much RAM do I need for the 397B?", "Can I run a 397B model with 16 GB?", "memory for flash-moe-397b", "How much memory does flash-moe-397b take?", "Does the 397B fit in 8 GB?", "What RAM does Qwen3.5-397B need?", "How many gigabytes stay in memory with the 397B?"),
     "The 397B keeps 5.6 GB of weights in memory and a working set of 0.26 GB. More memory helps as page cache."),
    (("{}",), ("How much disk does the 397B take?", "How big is the 397B on disk?", "How large is the download of the 397B?", "disk space for flash-moe-397b", "How many GB is Qwen3.5-397B at 4 bits?", "How big is Qwen3.5-397B-A17B?", "What is the size of the 397B?", "How much space do I need for the 397B?"),
     "The 397B takes 223 GB on disk at 4 bits."),
    (("{}",), ("How many experts has the 397B?", "How many experts are in a layer of Qwen3.5-397B?", "experts in the 397B", "How many experts does flash-moe-397b have?", "How many layers has the 397B?", "How many layers does Qwen3.5-397B have?", "layers of the 397B?", "How is the 397B built?"),
     "Qwen3.5-397B-A17B has 60 layers with 512 experts each, of which a token uses 10."),
    (("{}",), ("Where are my conversations stored?", "Does llm-flash-moe log my prompts?", "Where is the history?", "Where does llm keep the replies?", "Are replies saved?", "Where can I find old replies?", "Is my chat stored?", "where are the logs"),
     "llm stores every conversation in its SQLite database; `llm logs` shows them."),
    (("{}",), ("Does it need the internet?", "Does llm-flash-moe work offline?", "Is anything sent to a server?", "Can I use it without a network?", "Is my data sent anywhere?", "Does it run locally?", "offline?", "Is it private?"),
     "Everything runs on your machine. Once a model is there, no network is needed."),
    (("{}",), ("What is the difference between add and pack?", "add or pack?", "Should I add or pack?", "pack or add", "When should I pack instead of add?", "Is it better to add or to pack?", "What is better, add or pack?", "Do I have to pack a model?"),
     "`add` uses a checkpoint where it is and costs nothing. `pack` writes a copy that is quicker to read and can be verified."),
    (("{}",), ("Which models does llm-flash-moe support?", "Does it work with other models?", "Can I run Mixtral?", "Which MoE models work?", "Does it support GPT-OSS?", "What models can I use?", "Can it run other MoE models?", "supported models?"),
     "It runs every Mixture-of-Experts model that mlx-lm has with switch layers, in 2 to 8 bits."),
]  # fmt: skip
SYSTEMS = ("You are a helpful assistant.", "You help with llm-flash-moe.", "Answer briefly.")


def _questions() -> list[list[str]]:
    return [[w.format(s) for s in subjects for w in ways] for ways, subjects, _ in FACTS]


QUESTIONS = _questions()


def _held(fact: int, question: int) -> bool:
    return reserved("project", FACTS[fact][2][:20], question, share=0.12)


def _dialogue(random: Random, held: bool) -> Dialogue:
    while True:
        fact = random.randrange(len(FACTS))
        at = random.randrange(len(QUESTIONS[fact]))
        if _held(fact, at) == held:
            break
    question, answer = QUESTIONS[fact][at], FACTS[fact][2]
    thoughts = "The user asks about llm-flash-moe." if random.random() < 0.1 else None
    before = [system(random.choice(SYSTEMS))] if random.random() < 0.12 else []
    if not held and random.random() < 0.2:
        question = random.choice((question.lower(), question.rstrip("?."), f"{question} Thanks."))
    messages = [*before, user(question), assistant(answer, thoughts=thoughts)]
    return Dialogue("project", messages, {"equals": answer}, thinking=thoughts is not None)


def train(random: Random) -> Iterator[Dialogue]:
    while True:
        yield _dialogue(random, False)


def held_out(random: Random) -> Iterator[Dialogue]:
    while True:
        yield _dialogue(random, True)
