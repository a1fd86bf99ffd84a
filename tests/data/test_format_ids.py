"""From a file of every format to token ids, id by id: what is prompt, what is scored, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from dpo_lab.data.encoding import encode_chunk
from dpo_lab.data.formats import Shape
from dpo_lab.data.rows import open_rows
from dpo_lab.data.tokenize import PairTokenizer
from tests.conftest import REPOSITORY
from tests.support.templates import ids_of, tokenizer_of

END, TURN = "<|end|>", "<|im_end|>"
ADD = '{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}'
TOOLS = (
    '[{"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": {"type": "object",'
    ' "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}}]'
)


def chat(*turns: str) -> str:
    """Turns of 'role: text' as ChatML, up to where the assistant answers."""
    said = [turn.split(": ", 1) for turn in turns]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said) + "<|im_start|>assistant\n"


BIKES = "SUBREDDIT: r/bikes\n\nTITLE: Chain fell off\n\nPOST: It fell off twice.\nI fixed it.\n\nTL;DR:"
TEA = "SUBREDDIT: r/tea\n\nTITLE: Too bitter\n\nPOST: I steep it for an hour.\n\nTL;DR:"
PETS = "SUBREDDIT: r/pets\n\nTITLE: Loud parrot\n\nPOST: He wakes me at five.\n\nTL;DR:"
RIVER = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a river.\n\nIn Asia.\n\nAssistant:"
HELPFUL = "You are a helpful assistant."
SUMMARIES = {"prompt": "info.post", "chosen": "summaries.0.text", "rejected": "summaries.1.text", "label": "choice"}
RATED = {"prompt": "instruction", "responses": "completions"}

# file, settings, [(prompt, chosen, rejected)]
TEXT = [
    (
        "text",
        {},
        [("The plot", " was good.", " was dull."), (END, "A start.", "Start."), ("Größe: ", "🙂", "klein")],
    ),
    ("implicit_text", {}, [("The sky is", " blue.", " blurred."), ("Q: why?", "\nA: because", "\n\nA: no")]),
    (
        "hh_rlhf",
        "hh_rlhf",
        [
            ("\n\nHuman: How do I whistle?\n\nAssistant:", " Purse your lips and blow.", " No idea."),
            (RIVER, " The Mekong.", " The Danube."),
            ("\n\nHuman: Is ice heavier than water?\n\nAssistant:", " No:\n\nit floats.", " Yes."),
        ],
    ),
    (
        "tldr",
        "tldr",
        [
            (BIKES, " Chain fell off, fixed it.", " A bike."),
            (TEA, " Oversteeped tea is bitter.", " I drink tea."),
            (PETS, " Parrot wakes me early.", " Parrots live long."),
        ],
    ),
    (
        "ratings",
        {"pick": "best_rest"},
        [
            ("Name a fish.", "A carp.", "A whale."),
            ("Name a fish.", "A carp.", "Carp, I think."),
            ("Name a bird.", "A wren.", "A bat."),
        ],
    ),
    ("rated_objects", {"columns": RATED}, [("Name a fish.", "A carp.", "A whale.")]),
    (
        "summarize_from_feedback",
        {"columns": SUMMARIES, "label_is": "index"},
        [
            ("It fell off twice.", " Chain fell off.", " A bike."),
            ("I steep it for an hour.", " Oversteeped.", " Tea."),
        ],
    ),
]
CHAT = [
    (
        "chat",
        {},
        [
            (chat("system: Be brief.", "user: Hi"), "Hello.", "What?"),
            (chat("user: One?", "assistant: Two.", "user: Three?"), "Four.", "Five."),
        ],
    ),
    (
        "implicit_chat",
        {},
        [
            (chat("user: Hi"), "Hello.", "What?"),
            (chat("system: Be brief.", "user: Hi", "assistant: Yes?", "user: Bye"), "Bye.", "Why?"),
        ],
    ),
    (
        "sharegpt",
        {},
        [(chat("system: Be brief.", "user: Hi"), "Hello.", "What?"), (chat("user: One?"), "Two.", "Six.")],
    ),
    (
        "tools",
        {},
        [
            (
                chat(f"system: Tools: {TOOLS}", "user: 2 + 3?", f"assistant: [{ADD}]", "tool: 5"),
                "It is 5.",
                "It is 6.",
            ),
            (chat(f"system: Tools: {TOOLS}", "user: 2 + 3?"), f"[{ADD}]", "About 6."),
        ],
    ),
    (
        "ultrafeedback_binarized",
        "ultrafeedback_binarized",
        [
            (chat("user: Name a prime."), "Seven.", "Nine."),
            (chat("user: Translate 'chat' into English."), "It means cat.", "It means to talk."),
            (chat("user: Write a haiku\nabout rain."), "Grey sky, soft drumming", "Rain is wet."),
        ],
    ),
    (
        "shp",
        "shp",
        [
            (chat("user: Why did my bread not rise?"), "The yeast was dead.", "Buy bread."),
            (chat("user: Can I freeze dough?"), "Yes, after the first rise.", "No."),
            (chat("user: Butter or oil?"), "Oil, if it should stay moist.", "Butter tastes better."),
        ],
    ),
    (
        "orca_dpo_pairs",
        "orca_dpo_pairs",
        [
            (chat("user: What is 2 + 2?"), "4", " Sure! It is 5."),
            (chat(f"system: {HELPFUL}", "user: Name a fish."), "A carp.", "A whale."),
            (chat("system: Answer in French.", "user: Good morning?"), "Bonjour !", "Good morning!"),
        ],
    ),
    (
        "hh_rlhf",
        {"as_chat": True},
        [
            (chat("user: How do I whistle?"), "Purse your lips and blow.", "No idea."),
            (
                chat("user: Hi", "assistant: Hello!", "user: Name a river.\n\nIn Asia."),
                "The Mekong.",
                "The Danube.",
            ),
            (chat("user: Is ice heavier than water?"), "No:\n\nit floats.", "Yes."),
        ],
    ),
]
CASES = [("plain", END, *case) for case in TEXT] + [("chatml", TURN, *case) for case in CHAT]


def shape_of(settings: dict | str) -> Shape:
    """From settings, or from a preset of conf/data."""
    if isinstance(settings, str):
        preset = OmegaConf.load(REPOSITORY / "conf" / "data" / f"{settings}.yaml")
        settings = {key: preset[key] for key in ("format", "columns", "pick", "label_is", "as_chat") if key in preset}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Shape), settings))  # type: ignore[return-value]


@pytest.mark.parametrize(("family", "end", "file", "settings", "expected"), CASES)
def test_file_to_ids(family, end, file, settings, expected):
    path = REPOSITORY / "tests" / "fixtures" / "formats" / f"{file}.jsonl"
    (chunk, _) = open_rows(str(path), None, None, None).chunks()
    found = encode_chunk(chunk, shape_of(settings), PairTokenizer(tokenizer_of(family), 2000, 1000))
    assert found.bad == []
    texts = [part for prompt, *sides in expected for part in (prompt, *(side + end for side in sides))]
    ids = [ids_of(family, text) for text in texts]
    assert found.lengths.tolist() == np.reshape([len(part) for part in ids], (-1, 3)).tolist()
    assert found.tokens.tolist() == [token for part in ids for token in part]
    assert found.counts["rows"] == len(path.read_text().splitlines())


def test_every_fixture_is_asked_for():
    files = {path.stem for path in (REPOSITORY / "tests" / "fixtures" / "formats").glob("*.jsonl")}
    assert files == {file for _, _, file, _, _ in CASES}


def test_the_tools_above_are_those_of_the_file():
    line = (REPOSITORY / "tests" / "fixtures" / "formats" / "tools.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["tools"] == json.loads(TOOLS)
