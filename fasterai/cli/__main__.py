"""L6. `python -m fasterai.cli`."""

from __future__ import annotations

import sys

from fasterai.cli import main

sys.exit(main())
