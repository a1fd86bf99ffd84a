"""The front page of several studies: a forest plot of all their claims, each study linked to its page."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lab.reporting import forest
from dpo_lab.reporting.forest import Claim
from dpo_lab.reporting.html_page import render
from dpo_lab.studies import verdicts
from dpo_lab.studies.run_data import RunSet

MADE_BY = "dpo_lab.report"
STYLES = ("templates/comparison.css", "templates/forest.css")
EARLIER = re.compile(r"-(\d{4}-\d\d-\d\d)(-\d+)?$")  # ends the name of a record whose predictions others have replaced


@dataclass(frozen=True)
class Entry:
    """A study on the front page. link: to its page, relative to the front page; empty if it has none."""

    title: str
    word: str
    facts: Sequence[str]
    is_exploratory: bool
    claims: Sequence[Claim]
    link: str


def front_page(studies: Sequence[tuple[RunSet, str]]) -> str:
    """Return the HTML of the front page; the same runs give the same page. studies: each with the link to its page."""
    entries = [_entry(collection, link) for collection, link in studies]
    counts = Counter(claim.word for entry in entries for claim in entry.claims)
    total = sum(counts.values())
    words = ", ".join(f"{count} {word}" for word, count in sorted(counts.items(), key=lambda each: -each[1]))
    seconds = {folder: cost for collection, _ in studies for folder, cost in collection.costs().items()}
    spent = f" All runs took {math.fsum(seconds.values()) / 3600:.1f} h of CPU time." if seconds else ""
    return render(
        "front.html",
        MADE_BY,
        STYLES,
        title=f"Results of {len(entries)} stud{'ies' if len(entries) > 1 else 'y'}",
        summary=f"{total} claim{'s' if total > 1 else ''}: {words}.{spent}",
        studies=entries,
        plot=forest.PLOT,
    )


def title_of(collection: RunSet) -> str:
    """Return a study's title, with its budget if that is not `full`, and the day of its runs if its predictions have been
    replaced by others since.
    """
    budget, day = collection.record.get("budget"), EARLIER.search(collection.record.get("kept_as", ""))
    title = collection.title if budget in ("full", None) else f"{collection.title} (budget {budget})"
    return f"{title}, earlier predictions ({day[1]})" if day else title


def _entry(collection: RunSet, link: str) -> Entry:
    judged = verdicts.decide(collection)
    done = sum(run.is_done for run in collection.runs)
    facts = [f"{len(collection.seeds)} seeds"]
    facts += [f"{done} of {len(collection.runs)} runs done"] * (done < len(collection.runs))
    facts += [f"{collection.cpu_seconds() / 3600:.2f} h"]
    if secondary := sum(not prediction.primary for prediction, _ in judged):
        facts.append(f"{secondary} secondary prediction{'s' if secondary > 1 else ''} on its page")
    return Entry(
        title_of(collection),
        verdicts.study_verdict(judged),
        facts,
        collection.is_exploratory,
        forest.claims(judged, only_primary=True),
        link,
    )
