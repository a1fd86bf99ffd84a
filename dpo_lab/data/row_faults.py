"""Faults of rows that are counted while pairs are read, and the warning for each."""

from __future__ import annotations

from datetime import datetime

# Given to templates that ask for the current date, so that a run has the same tokens on every day: what Llama's fall back to
DATE = datetime(2024, 7, 26)

BEGUN = "prompts that hold the begin token already"
SPECIAL = "prompts with special tokens in their text"
UNKNOWN = "pairs with characters that the tokenizer does not know"
REASONING = "prompts without the reasoning of earlier turns"
TOOLS = "prompts without the tools of their rows"
DATED = "prompts with a fixed date"
REPEATED = "pairs whose sides both begin with the prompt"
MEDIA = "rows with images, sound or video, which are not read"
JSON_READ = "rows of messages as JSON text"
JSON_LEFT = "rows of JSON of messages, left as plain text"

# What an expert would want to know of each; {n} is how many.
SAID = {
    BEGUN: (
        "{n}: the tokenizer begins every text with that token, which is not put there twice; the prompts may be rendered by a"
        " chat template already"
    ),
    SPECIAL: (
        "{n}: was a chat template written into the text? If the policy has one, give messages or the bare text"
        " (data.as_chat=true); else see that it is the policy's own (show=3)"
    ),
    UNKNOWN: "{n}: they become its unknown token, and what they said is lost; is it the policy's own tokenizer?",
    REASONING: "{n}: the chat template leaves it out, as it would when the policy is asked; answers keep theirs",
    TOOLS: (
        "{n}: the chat template does not write them, so that answers call what was not offered; type another"
        " policy.chat_template=FILE.jinja"
    ),
    DATED: (
        f"{{n}}: the chat template writes the current date, and is given {DATE:%d %B %Y} in its place, so that a run has the"
        " same tokens on every day; for another date, write it into a copy of the template and type"
        " policy.chat_template=FILE.jinja"
    ),
    REPEATED: "{n}: the prompt would be there twice; leave it out of the two sides",
    MEDIA: (
        "{n}: only text trains, so that answers about what is seen or heard have nothing to stand on; leave such rows out"
    ),
    JSON_READ: "{n}: they are read as messages",
    JSON_LEFT: "{n}: they train as they stand; where messages are meant, store prompt and both sides alike, as JSON",
}
