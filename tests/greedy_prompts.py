"""Twenty varied prompts of 5 to 1,500 tokens for comparing greedy ids with transformers'.

Texts of many kinds (prose, code, lists, other scripts, numbers, chat) and, for the long ones, documents
built from numbered sentences, so that no position looks like another.
"""

from __future__ import annotations

from dataclasses import dataclass

_TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "1, 1, 2, 3, 5, 8, 13, 21, 34,",
    "La révolution française a commencé en 1789 parce que",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist",
    "日本の首都は東京です。フランスの首都は",
    "SELECT name, COUNT(*) AS orders FROM customers JOIN orders USING (customer_id)\nGROUP BY",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Ingredients:\n- 200 g flour\n- 2 eggs\n- 300 ml milk\n\nMethod:\n1.",
    "😀 😃 😄 are emojis that show",
)
_SUBJECTS = (
    "The engineer",
    "A small robot",
    "My neighbour",
    "The old clock",
    "Our teacher",
    "The river",
    "A black cat",
)
_VERBS = ("measured", "repaired", "described", "forgot", "painted", "carried", "explained")
_OBJECTS = ("the bridge", "seven boxes", "a broken radio", "the long letter", "two maps", "the northern gate")
# Target lengths in tokens of the eight documents; each is cut to exactly this many ids.
_DOCUMENT_LENGTHS = (64, 100, 199, 256, 384, 640, 1_024, 1_500)


@dataclass(frozen=True, slots=True)
class GreedyPrompt:
    """A text, and the number of ids to keep of it (0: all)."""

    name: str
    text: str
    keep_ids: int = 0


def _document(number: int, sentences: int) -> str:
    lines = []
    for i in range(sentences):
        k = i * 5 + number * 3
        lines.append(
            f"{i + 1}. {_SUBJECTS[k % 7]} {_VERBS[(k // 2) % 7]} {_OBJECTS[(k // 3) % 6]} "
            f"in {1900 + (k * 7) % 120}, {k % 50 + 2} days after the storm."
        )
    return f"Report {number}\n\n" + "\n".join(lines)


def greedy_prompts() -> list[GreedyPrompt]:
    """All twenty, short ones first."""
    texts = [GreedyPrompt(f"text-{i}", text) for i, text in enumerate(_TEXTS)]
    documents = [
        GreedyPrompt(f"document-{length}", _document(i, length // 12 + 4), length)
        for i, length in enumerate(_DOCUMENT_LENGTHS)
    ]
    return texts + documents


# CI's six: the shortest, code, another script, a chat, and two documents that span many blocks and chunks.
CI_PROMPTS = ("text-0", "text-2", "text-6", "text-8", "document-100", "document-384")
