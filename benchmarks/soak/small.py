"""The cheapest run of a soak: the small fit of the tests, which draws from every random generator, in the folder given."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from dpo_lab.distributed.signals import StopSignal, end_on_signals, raise_on_signals
from tests.support import small_fit


def main(folder: Path) -> int:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    raise_on_signals()
    try:
        small_fit.run(folder)
    except StopSignal as stopped:
        return stopped.exit_code
    finally:
        end_on_signals()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
