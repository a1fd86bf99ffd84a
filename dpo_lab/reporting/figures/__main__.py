"""The command `python -m dpo_lab.reporting.figures FOLDER`: draw a run's figures again.

python -m dpo_lab.reporting.figures outputs/dpo/default/seed=0
"""

from __future__ import annotations

import sys
from pathlib import Path

from dpo_lab.errors import LabError
from dpo_lab.reporting.figures import draw_run

if len(sys.argv) == 2:
    try:
        print(*draw_run(Path(sys.argv[1])), sep="\n")
    except (FileNotFoundError, LabError) as error:
        sys.exit(str(error))
else:
    sys.exit(__doc__)
