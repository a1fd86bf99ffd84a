"""A run's figures again, from what lies in its folder.

python -m dpo_lab.results.figures outputs/dpo/default/seed=0
"""

from __future__ import annotations

import sys
from pathlib import Path

from dpo_lab.results.figures import draw_run

if len(sys.argv) == 2:
    try:
        print(*draw_run(Path(sys.argv[1])), sep="\n")
    except FileNotFoundError as error:
        sys.exit(str(error))
else:
    sys.exit(__doc__)
