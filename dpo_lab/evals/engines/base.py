"""The base class of generation engines: what each states of itself, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpo_lab.core.pairs import Tokens
from dpo_lab.core.registry import add_to_table
from dpo_lab.errors import LabError

if TYPE_CHECKING:
    from dpo_lab.data.tokenize import PairTokenizer
    from dpo_lab.models.policy import Policy
    from dpo_lab.models.sampling import Sample

ENGINES: dict[str, type[Engine]] = {}  # by name in configs


class EngineError(LabError, ValueError):
    """Raised where an engine can't run or gives no response; the message is one line that says what to type."""


@dataclass(frozen=True)
class Request:
    """What is sampled: a response of at most max_new_tokens of the policy to each encoded prompt, batch_size at a time.

    encoder: of the prompts, with the end tokens; what: the title of the progress.
    """

    policy: Policy
    encoder: PairTokenizer
    prompts: Sequence[Tokens]
    max_new_tokens: int
    seed: int
    batch_size: int
    what: str


@dataclass
class Engine:
    """The base class of engines, which sample responses of a policy. The fields of a subclass are its settings,
    `evals.engine.FIELD=`; it states its name in configs and defines `generate`.

    All engines draw from the policy's full distribution: temperature 1, top_p 1, no top_k, until one of the encoder's end
    tokens or max_new_tokens. Log-probabilities are never taken from an engine. Their random numbers and their rounding
    differ, so that only samples of one engine are compared.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        add_to_table(ENGINES, name, cls)

    def check(self) -> None:
        """Raise LabError if it can't run; called before training."""

    def generate(self, request: Request) -> list[Sample]:
        """Sample a response to each prompt of the request.

        All ranks have to call it, and get all samples. Raise EngineError if a prompt gets no response.
        """
        raise NotImplementedError


def sampled_on_rank_zero(request: Request, name: str, generate: Callable[[], list[list[int]]]) -> list[Sample]:
    """Return what rank 0 generates for the prompts, as samples that end with their first end token, on every rank.

    name: of the engine. Raises EngineError for a sharded policy, or if a prompt has no response.
    """
    from dpo_lab.distributed.collectives import broadcast_object, rank_and_world_size
    from dpo_lab.models.sampling import until_end
    from dpo_lab.models.sharding import sharded_of
    from dpo_lab.terminal.progress import track

    count, instead = len(request.prompts), "type evals/engine=exact"
    if sharded_of(request.policy.model) is not None:
        raise EngineError(f"evals/engine={name}: does not run a policy that is sharded over ranks; {instead}")
    rows: list[list[int]] = []
    if rank_and_world_size()[0] == 0:
        with track(request.what, count) as advance:
            rows = generate()
            advance(count)
    rows = broadcast_object(rows)
    if empty := sum(not row for row in rows) + count - len(rows):
        raise EngineError(f"evals/engine={name}: {empty} of {count} prompts got no response; {instead}")
    return [until_end(row, request.encoder.end_ids) for row in rows]
