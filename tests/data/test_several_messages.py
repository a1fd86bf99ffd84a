"""Responses of several messages, token by token: what the assistant wrote is scored, what users and tools say is not."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from rich.console import Console

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.data.collate import collate
from dpo_lab.data.content_checks import BadChat
from dpo_lab.data.formats import Shape
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.inspection import terminal
from dpo_lab.inspection.token_view import view_pair
from tests.conftest import REPOSITORY, python_m
from tests.support.templates import CHATML, LLAMA3, ids_of, tokenizer_of, words_tokenizer

FILE = REPOSITORY / "tests" / "fixtures" / "tool_use.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text().splitlines()]
LLAMA3_CALLS = LLAMA3.replace("m.content | trim", "(m.content or m.tool_calls | tojson) | trim").replace(
    "+ m.role +", "+ ('ipython' if m.role == 'tool' else m.role) +"
)
SAID = "{{ m.content or (m.tool_calls | tojson) }}<|im_end|>"
MARKED = CHATML.replace(
    f"{SAID}\n",
    f"{{% if m.role == 'assistant' %}}{{% generation %}}{SAID}{{% endgeneration %}}{{% else %}}{SAID}{{% endif %}}"
    "{{ '\\n' }}",
)
# Writes an answer otherwise once others follow, as templates do that leave out earlier reasoning.
FORGETS = CHATML.replace(
    "{{ m.content or (m.tool_calls | tojson) }}",
    "{{ '(earlier) ' if m.role == 'assistant' and not loop.last }}{{ m.content or (m.tool_calls | tojson) }}",
)


def encoder_of(family: str, template: str | None = None, max_length: int = 4000) -> PairTokenizer:
    tokenizer = tokenizer_of(family)
    if template is not None:
        tokenizer.chat_template = template
    return PairTokenizer(tokenizer, max_length, 2000)


def encoded(encoder: PairTokenizer, *pairs: Pair) -> tuple[list[EncodedPair], Counter[str]]:
    counts: Counter[str] = Counter()
    return encoder.pairs(pairs, counts), counts


def pair_at(number: int) -> Pair:
    (pair,) = Shape().read(ROWS[number])
    return pair


def scored_ids(family: str, *texts: str) -> tuple[list[int], list[bool]]:
    """Ids of texts that are scored and not scored in turn, and which ids are scored."""
    pieces = [ids_of(family, text) for text in texts]
    return [number for piece in pieces for number in piece], [
        i % 2 == 0 for i, piece in enumerate(pieces) for _ in piece
    ]


def call(a: int, b: int) -> str:
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return json.dumps([{"id": "call1", "type": "function", "function": function}])


END, OPEN = "<|im_end|>", "<|im_start|>assistant\n"
L_END, L_OPEN = "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"
BY_HAND = [  # row, chosen, rejected: scored, not scored, scored, ...
    (
        0,
        ([call(10, 17)], ["27"], ["It is 27."]),
        (["It is 28."],),
    ),
    (
        1,
        ([call(41, 30)], ["71"], ["It is 71."]),
        ([call(41, 33)], ["74"], ["It is 74."]),
    ),
    (
        2,
        ([call(46, 9)], ["55"], ["It is 55."]),
        ([call(46, 9)], ["error: busy"], ["I could not find out."]),
    ),
    (
        3,
        (["Shall I add them?"], ("user", "Please do."), [call(7, 16)], ["23"], ["It is 23."]),
        (["Why do you ask?"], ("user", "Just add them."), ["It is 23."]),
    ),
]


def as_chatml(turns) -> list[str]:
    texts = []
    for at, turn in enumerate(turns):
        if at % 2 == 0:
            texts.append(f"{turn[0]}{END}")
        else:
            role, said = turn if len(turn) == 2 else ("tool", turn[0])
            texts.append(f"\n<|im_start|>{role}\n{said}{END}\n{OPEN}")
    return texts


def as_llama3(turns) -> list[str]:
    texts = []
    for at, turn in enumerate(turns):
        if at % 2 == 0:
            texts.append(f"{turn[0]}{L_END}")
        else:
            role, said = turn if len(turn) == 2 else ("ipython", turn[0])
            texts.append(f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}{L_END}{L_OPEN}")
    return texts


FAMILIES = [
    ("chatml", CHATML, as_chatml),
    ("chatml", MARKED, as_chatml),
    ("chatml", MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), as_chatml),
    ("llama3", LLAMA3_CALLS, as_llama3),
]


@pytest.mark.parametrize(("row", "chosen", "rejected"), BY_HAND)
@pytest.mark.parametrize(
    ("family", "template", "as_texts"), FAMILIES, ids=["chatml", "generation marks", "marks without the end", "llama3"]
)
def test_every_token_is_scored_or_not_as_by_hand(family, template, as_texts, row, chosen, rejected):
    (pair,), counts = encoded(encoder_of(family, template), pair_at(row))
    sides = zip((pair.chosen, pair.rejected), pair.scored, (chosen, rejected), strict=True)
    for ids, scored, turns in sides:
        assert (list(ids), list(scored)) == scored_ids(family, *as_texts(turns))
    assert counts["pairs with several messages after the prompt"] == 1
    lengths = collate([pair]).scored_lengths[0]
    assert lengths.tolist() == [sum(scored_ids(family, *as_texts(turns))[1]) for turns in (chosen, rejected)]


@pytest.mark.parametrize(("family", "template", "as_texts"), FAMILIES)
def test_all_tokens_together_are_the_rendered_chat(family, template, as_texts):
    encoder = encoder_of(family, template)
    for number in range(len(ROWS)):
        pair = pair_at(number)
        (found,), _ = encoded(encoder, pair)
        for side, ids in ((pair.chosen, found.chosen), (pair.rejected, found.rejected)):
            whole = encoder.tokenizer.apply_chat_template([*pair.prompt, *side], tools=pair.tools, tokenize=False)
            joined = encoder.tokenizer.decode([*found.prompt, *ids])
            assert whole.startswith(joined)
            assert whole.removeprefix(joined).strip() == ""


def test_transformers_own_mask_agrees_where_the_template_has_generation_marks():
    encoder, pair = encoder_of("chatml", MARKED), pair_at(3)
    (found,), _ = encoded(encoder, pair)
    both = encoder.tokenizer.apply_chat_template(
        [*pair.prompt, *pair.chosen], tools=pair.tools, return_dict=True, return_assistant_tokens_mask=True
    )
    theirs = both["assistant_masks"][len(found.prompt) : len(found.prompt) + len(found.chosen)]
    assert theirs == found.scored[0].astype(int).tolist()


def test_a_truncated_response_keeps_the_marks_of_its_tokens():
    (whole,), _ = encoded(encoder_of("chatml"), pair_at(1))
    (cut,), counts = encoded(encoder_of("chatml", max_length=len(whole.prompt) + 120), pair_at(1))
    assert len(cut.chosen) == 120 < len(whole.chosen)
    assert cut.scored[0].tolist() == whole.scored[0][:120].tolist()
    assert 0 < cut.scored_lengths[0] < 120
    assert counts["responses truncated"] == 2


def test_noise_swaps_what_is_scored_with_the_sides():
    (pair,), _ = encoded(encoder_of("chatml"), pair_at(0))
    flipped = PairTable.of([pair.flip()])[0]
    assert flipped.scored_lengths == pair.scored_lengths[::-1]
    assert flipped.scored[1].tolist() == pair.scored[0].tolist()


def test_a_response_of_one_message_has_no_marks():
    row = {"prompt": ROWS[0]["prompt"], "chosen": ROWS[0]["chosen"][-1:], "rejected": ROWS[0]["rejected"]}
    for template in (CHATML, MARKED):
        (pair,), _ = encoded(encoder_of("chatml", template), *Shape().read(row))
        assert pair.scored is None


def test_a_tokenizer_that_begins_texts_with_a_space_has_no_such_token_inside():
    tokenizer = words_tokenizer(["user:", "assistant:", "tool:", "hi", "one", "two", "three"])
    tokenizer.chat_template = (
        "{% for m in messages %} {{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %} assistant:{% endif %}"
    )
    say = lambda role, content: {"role": role, "content": content}  # noqa: E731
    row = {
        "prompt": [say("user", "hi")],
        "chosen": [say("assistant", "one"), say("tool", "two"), say("assistant", "three")],
        "rejected": [say("assistant", "two")],
    }
    (pair,), _ = encoded(PairTokenizer(tokenizer, 100, 50), *Shape().read(row))
    ended = [i for i, number in enumerate(pair.chosen) if number == tokenizer.eos_token_id]
    assert len(ended) == 3
    assert pair.scored[0][: ended[0] + 1].all()
    assert not pair.scored[0][ended[0] + 1 : ended[1] + 1].any()
    assert pair.scored[0][-1]
    assert "three" in tokenizer.decode([n for n, scored in zip(pair.chosen, pair.scored[0], strict=True) if scored])


def test_what_can_not_be_told_apart_is_refused():
    with pytest.raises(BadChat, match=r"writes message \d of a response otherwise once others follow; type another"):
        encoded(encoder_of("chatml", FORGETS), pair_at(3))
    plain = tokenizer_of("plain")
    plain.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content or (m.tool_calls | tojson) }}\n{% endfor %}"
    )
    with pytest.raises(BadChat, match="ends no turn by a special token"):
        PairTokenizer(plain, 400, 300).pairs([replace(pair_at(3), tools=None)], Counter())
    nothing = MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'")
    with pytest.raises(BadChat, match="generation marks hold nothing of a response"):
        encoded(encoder_of("chatml", nothing), pair_at(0))


@pytest.mark.parametrize(
    ("chosen", "roles"),
    [("user assistant", "user, assistant"), ("assistant tool", "assistant, tool"), ("tool", "tool")],
)
def test_a_response_begins_and_ends_with_the_assistant(chosen, roles):
    row = {"prompt": "Hi", "rejected": [{"role": "assistant", "content": "No."}]}
    row["chosen"] = [{"role": role, "content": "x"} for role in chosen.split()]
    with pytest.raises(ValueError, match=rf"\(roles {roles}\): a response must begin and end with the assistant"):
        Shape().read(row)


def test_the_prompt_ends_before_an_answer_of_the_assistant():
    """Rows 2: both sides make the same call and hear another result."""
    pair = pair_at(2)
    assert [message["role"] for message in pair.prompt] == ["user"]
    assert [message["role"] for message in pair.chosen] == ["assistant", "tool", "assistant"]


def test_the_view_of_tokens_shows_what_is_scored():
    encoder = encoder_of("chatml")
    (pair,), _ = encoded(encoder, pair_at(1))
    view = view_pair(PairTable.of([pair]), 0, encoder, "rows:1")
    console = Console(width=100, file=io.StringIO())
    terminal._pair(console, view)
    printed = console.file.getvalue()
    scored, total = pair.scored_lengths[0], len(pair.chosen)
    assert f"chosen: {total} tokens, {scored} of them scored" in printed
    marks = re.findall(r"^  ([.+-]) ", printed, re.M)
    runs = [mark for i, mark in enumerate(marks) if i == 0 or marks[i - 1] != mark]
    assert runs == [".", "+", ".", "+", "-", ".", "-"]
    context = "".join(line[4:] for line in printed.split("chosen:")[1].splitlines() if line.startswith("  . "))
    assert "t o o l ⏎ 7 1" in context


@pytest.mark.slow
@pytest.mark.extended
def test_a_run_on_the_file_goes_on_bit_identically(tmp_path):
    """6 steps in one go, and 3, then 6: the same weights, and the same log of the steps that both made."""
    from safetensors.torch import load_file

    from dpo_lab.models.policy import Policy, TinyPolicy

    tokenizer = tokenizer_of("chatml")
    model = TinyPolicy(hidden_size=32, layers=1, heads=4, intermediate_size=64, context=640).build(tokenizer, seed=0)
    Policy(model, tokenizer).save(tmp_path / "model")
    common = (
        f"policy=pretrained policy.path=model data=jsonl data.path={FILE} data.validation_fraction=0.3 data.batch_size=4"
        " data.max_length=600 data.max_prompt_length=400 evals.max_new_tokens=8 evals.num_prompts=4 figures=false"
        " loss.ld_alpha=0.5 trainer.val_check_interval=3 trainer.log_every_n_steps=1 optim.warmup_steps=0 optim.decay=constant"
    ).split()
    weights = {}
    for name, runs in {"whole": [6], "halves": [3, 6]}.items():
        for steps in runs:
            folder = f"hydra.run.dir={tmp_path / name}"
            done = python_m("dpo_lab.train", *common, folder, f"trainer.max_steps={steps}", cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "pairs with several messages after the prompt 20" in done.stdout + done.stderr
        weights[name] = load_file(tmp_path / name / "policy" / "model.safetensors")
    assert weights["whole"].keys() == weights["halves"].keys()
    assert all((weights["whole"][name] == weights["halves"][name]).all() for name in weights["whole"])
