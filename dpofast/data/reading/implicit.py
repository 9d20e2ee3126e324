"""Where the prompt ends in data that has only a chosen and a rejected whole."""

from __future__ import annotations

from dpofast.data.prefix import common_prefix_length
from dpofast.data.reading.messages import Message
from dpofast.data.reading.row_error import RowError

# What stands right before an answer in rendered conversations. The one that ends last within the
# common text is the boundary.
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

_ANSWERS_ALONE = (
    "chosen and rejected begin differently, so no prompt can be found in them; give the prompt in "
    "a column of its own"
)


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts that begin with the same prompt into prompt, chosen and rejected.

    The prompt ends after the last generation prompt (GENERATION_PROMPTS) in what both texts have
    in common. Where there is none, it ends at the last line break or before the last blank of the
    common text, so that no word is cut. What both answers begin with then counts as prompt, which
    leaves the difference of their log-probs unchanged.

    Raises:
        RowError: nothing in common, or an answer is nothing but the prompt.
    """
    common = chosen[: common_prefix_length(chosen, rejected)]
    end = _after_last_marker(common)
    if end is None:
        end = _before_last_word(common, limit=min(len(chosen), len(rejected)) - 1)
    if end == 0:
        raise RowError(_ANSWERS_ALONE)
    return common[:end], chosen[end:], rejected[end:]


def split_messages(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations: their common messages are the prompt, up to an assistant's turn.

    Raises:
        RowError: they have no message in common, or no answer follows.
    """
    end = common_prefix_length(chosen, rejected)
    # Each answer needs a message, and begins with one that the assistant wrote.
    end = min(end, len(chosen) - 1, len(rejected) - 1)
    while end > 0 and {chosen[end]["role"], rejected[end]["role"]} != {"assistant"}:
        end -= 1
    if end == 0:
        raise RowError(_ANSWERS_ALONE)
    return chosen[:end], chosen[end:], rejected[end:]


def _after_last_marker(common: str) -> int | None:
    ends = [
        start + len(marker) for marker in GENERATION_PROMPTS if (start := common.rfind(marker)) >= 0
    ]
    return max(ends, default=None)


def _before_last_word(common: str, limit: int) -> int:
    """The last position where a line begins, or where the blank before a word stands."""
    for end in range(min(len(common), limit), 0, -1):
        if common[end - 1] == "\n":
            return end
        if end < len(common) and common[end] in " \t" and common[end - 1] not in " \t":
            return end
    return 0
