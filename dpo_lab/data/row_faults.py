"""Faults of rows: what to do with them, those that are counted while pairs are read, and the warning for each."""

from __future__ import annotations

from datetime import datetime
from enum import Enum


class OnBadRow(str, Enum):
    """What to do with a row that is not a pair."""

    error = "error"
    skip = "skip"


class Contradictions(str, Enum):
    """What to do with two pairs that contradict each other: A preferred to B, and B preferred to A."""

    error = "error"
    keep = "keep"  # keep both: annotators differ
    drop = "drop"  # drop both


# Given to templates that ask for the current date, so that tokens don't depend on the day; the fallback of Llama's
DATE = datetime(2024, 7, 26)

BEGUN = "prompts that hold the begin token already"
SPECIAL = "prompts with special tokens in their text"
UNKNOWN = "pairs with characters that the tokenizer does not know"
REASONING = "prompts without the reasoning of earlier turns"
TOOLS = "prompts without the tools of their rows"
DATED = "prompts with a fixed date"
SEVERAL = "pairs with several messages after the prompt"  # no fault: it has no description
REPEATED = "pairs whose sides both begin with the prompt"
MEDIA = "rows with images, sound or video, which are not read"
JSON_READ = "rows of messages as JSON text"
JSON_LEFT = "rows of JSON of messages, left as plain text"

# The warning for each; {n} is the count with its name.
DESCRIPTIONS = {
    BEGUN: (
        "{n}: the tokenizer begins every text with that token, so it is not added again; the prompts may already be"
        " rendered by a chat template"
    ),
    SPECIAL: (
        "{n}: was the text rendered by a chat template? If the policy has one, give messages or text without its tokens"
        " (data.as_chat=true); else check that it is the policy's own template (show=3)"
    ),
    UNKNOWN: "{n}: they become its unknown token and are lost; is it the policy's own tokenizer?",
    REASONING: "{n}: the chat template leaves it out, as it does at inference; answers keep theirs",
    TOOLS: (
        "{n}: the chat template does not render them, so answers call tools that the prompt does not offer; type another"
        " policy.chat_template=FILE.jinja"
    ),
    DATED: (
        f"{{n}}: the chat template writes the current date, which is replaced by {DATE:%d %B %Y}, so that tokens are the"
        " same on every day; for another date, write it into a copy of the template and type"
        " policy.chat_template=FILE.jinja"
    ),
    REPEATED: "{n}: the prompt would be repeated; leave it out of chosen and rejected",
    MEDIA: "{n}: only text is trained on, so answers about images or sound have no basis; leave such rows out",
    JSON_READ: "{n}: they are read as messages",
    JSON_LEFT: "{n}: they train as plain text; if they are messages, store prompt, chosen and rejected alike, as JSON",
}
