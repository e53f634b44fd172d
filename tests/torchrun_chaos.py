"""`cineline ARGUMENTS` under torchrun, whose first start has the faults of the environment and no later one."""

from __future__ import annotations

import os

from cineline.cli import main
from cineline.core.faults import VARIABLE

if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        del os.environ[VARIABLE]
    main()
