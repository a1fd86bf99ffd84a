"""Figures again, from what lies in folders: of one run, or of a sweep of beta.

python -m dpo_lab.results.figures outputs/dpo/default/seed=0
python -m dpo_lab.results.figures outputs/reference docs/images/reference.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from dpo_lab.results.figures import draw_run
from dpo_lab.results.figures.cost_of_gain import cost_of_gain, done_records, table

if len(sys.argv) == 3:
    records = done_records(Path(sys.argv[1]))
    cost_of_gain(records, Path(sys.argv[2]))
    print(table(records))
elif len(sys.argv) == 2:
    try:
        print(*draw_run(Path(sys.argv[1])), sep="\n")
    except FileNotFoundError as error:
        sys.exit(str(error))
else:
    sys.exit(__doc__)
