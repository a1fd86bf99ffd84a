"""The command `python -m dpo_lab.push FOLDER OWNER/NAME [--public] [--dry-run]`: push the policy that a run trained, with its
model card, to the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_lab.errors import LabError
from dpo_lab.reporting.hub import PushFailed, files_to_push, push
from dpo_lab.runs.redact import redact_text

DESCRIPTION = """\
Push the policy, the adapters or the reward model that a run trained to the Hugging Face hub: weights, tokenizer and model
card. No data, samples, logs or checkpoints are pushed. The repository is made private unless --public is given. The token
is that of the environment, HF_TOKEN; HF_ENDPOINT names another hub.
"""
EXAMPLES = """\
examples:
  python -m dpo_lab.push outputs/dpo/default/seed=0 me/my-policy --dry-run     list the files and push nothing
  HF_TOKEN=... python -m dpo_lab.push outputs/dpo/default/seed=0 me/my-policy
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done; 1 the hub refused or was not reached; 2 error, see the message."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m dpo_lab.push", None, DESCRIPTION, EXAMPLES, formatter_class=shape)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a finished run")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository on the hub; it is made if it does not exist")
    parser.add_argument("--public", action="store_true", help="make the repository public, or push to a public one")
    parser.add_argument("--dry-run", action="store_true", help="list what would be pushed")
    options = parser.parse_args(arguments)
    try:
        for file in files_to_push(options.folder):
            print(f"{file.stat().st_size:>14,} bytes  {file.name}")
        if not options.dry_run:
            print(f"Pushed: {push(options.folder, options.repo, options.public)}")
    except LabError as error:
        print(f"error: {redact_text(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, PushFailed) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
