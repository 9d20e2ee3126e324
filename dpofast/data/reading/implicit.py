"""Finds the prompt in data without a prompt column, where all answers repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from dpofast.columns import PAIRED
from dpofast.data.prefix import common_prefix_length
from dpofast.data.reading.messages import ROLES, Message, same, speaker
from dpofast.data.reading.row_error import RowError, naming

# Markers that come right before an answer in rendered conversations. The prompt ends after the
# marker that ends last in the common text.
GENERATION_PROMPTS = (
    "\n\nAssistant:",  # hh transcripts
    "<|im_start|>assistant\n",  # ChatML
    "<|start_header_id|>assistant<|end_header_id|>\n\n",  # Llama 3
    "[/INST]",  # Llama 2, Mistral
    "<start_of_turn>model\n",  # Gemma
    "<|turn>model\n",  # Gemma 4
    "<|assistant|>\n",  # Zephyr, Phi 3
    "<|assistant|>",
    "<|Assistant|>",
    "<\uff5cAssistant\uff5c>",  # DeepSeek, with full-width bars
    "<|im_start|>assistant<|im_sep|>",  # Phi 4
    "<|CHATBOT_TOKEN|>",  # Command R
    "<|start_of_role|>assistant<|end_of_role|>",  # Granite
    "<|start|>assistant<|channel|>final<|message|>",  # Harmony
    "### Response:\n",  # Alpaca
    "### Response:",
    "\nASSISTANT:",  # Vicuna
    " ASSISTANT:",
    "\nAssistant:",
)


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts that begin with the same prompt.

    The prompt ends after the last generation prompt (GENERATION_PROMPTS) in the common text. If
    there is none, it ends after the last line break or before the last blank in the common text,
    so no word is cut. Words that both answers begin with then count as prompt, which leaves the
    difference of the answers' log-probs unchanged.

    Returns:
        prompt, chosen, rejected.
    Raises:
        RowError: the texts have no prompt in common.
    """
    common = chosen[: common_prefix_length(chosen, rejected)]
    end = _after_last_marker(common)
    if end is None:
        # The limit leaves at least one character to each answer.
        end = _before_last_word(common, limit=min(len(chosen), len(rejected)) - 1)
    if end == 0:
        raise RowError(_nothing_in_common(*PAIRED.answers))
    return common[:end], chosen[end:], rejected[end:]


def split_messages(
    *conversations: list[Message], names: Sequence[str] = PAIRED.answers
) -> tuple[list[Message], ...]:
    """Split conversations that begin with the same prompt, or a single one.

    The prompt is the longest common beginning after which all answers begin with a message from
    the assistant.

    Args:
        *conversations: one for each answer.
        names: their names, used in errors.
    Returns:
        The prompt and each answer.
    Raises:
        RowError: the conversations have no prompt in common.
    """
    # Each answer needs at least one message, even if the conversations are identical.
    end = min(shared_length(*conversations), *(len(messages) - 1 for messages in conversations))
    while end > 0 and {speaker(messages[end]) for messages in conversations} != {"assistant"}:
        end -= 1
    if end == 0:
        raise RowError(_why_nothing_in_common(conversations, names))
    return conversations[0][:end], *(messages[end:] for messages in conversations)


def shared_length(first: list[Message], *others: list[Message]) -> int:
    """Number of messages with which all of these lists begin."""
    ends = [common_prefix_length(first, other) for other in others]
    end = min(ends, default=len(first))
    return next(
        (i for i in range(end) if not all(same(first[i], other[i]) for other in others)), end
    )


def _why_nothing_in_common(conversations: Sequence[list[Message]], names: Sequence[str]) -> str:
    for name, messages in zip(names, conversations, strict=True):
        if "assistant" not in map(speaker, messages):
            found = list(dict.fromkeys(str(message["role"]) for message in messages))
            unknown = [role for role in found if role.strip().lower() not in ROLES]
            if unknown:
                remedy = f"say who that is with {naming('roles', {unknown[-1]: 'assistant'})}"
            else:
                remedy = "end it with one or remove the row"
            return f"{name} has no message from the assistant (found: {', '.join(found)}); {remedy}"
    if len(conversations) == 1:
        return f"{names[0]} has an answer but no prompt before it; give it one or remove the row"
    firsts = [messages[0] for messages in conversations]
    # The first conversation and one that differs from it say what is wrong.
    at = next((i for i, each in enumerate(firsts) if not same(each, firsts[0])), 1)
    first, second = firsts[0], firsts[at]
    one, other = names[0], names[at]
    systems = [speaker(message) == "system" for message in (first, second)]
    if any(systems) and not all(systems):
        if systems[1]:
            one, other = other, one
        return (
            f"{one} begins with a system message and {other} doesn't; write it into both, or only "
            "into a column system"
        )
    if (speaker(first), first.get("content")) == (speaker(second), second.get("content")):
        fields = [k for k in {**first, **second} if not same(first.get(k), second.get(k))]
        return (
            f"the first messages of {one} and {other} differ in {', '.join(fields) or 'order'}, "
            "so no prompt can be found in them; write them in the same way"
        )
    return _nothing_in_common(one, other)


def _nothing_in_common(one: str, other: str) -> str:
    return (
        f"{one} and {other} begin differently, so no prompt can be found in them; give the prompt "
        "in a column of its own"
    )


def _after_last_marker(common: str) -> int | None:
    ends = [
        start + len(marker) for marker in GENERATION_PROMPTS if (start := common.rfind(marker)) >= 0
    ]
    return max(ends, default=None)


def _before_last_word(common: str, limit: int) -> int:
    """Length of the common text up to its last line break or blank; 0 if it has neither.

    A line break belongs to the prompt. A blank belongs to the answer, because the token of a word
    usually includes the blank before the word.

    Args:
        common: the text that both answers begin with.
        limit: greatest length to return.
    """
    for end in range(min(len(common), limit), 0, -1):
        if common[end - 1] == "\n":
            return end
        if end < len(common) and common[end] in " \t" and common[end - 1] not in " \t":
            return end
    return 0
