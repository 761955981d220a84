"""`python -m fasterai.study`."""

from __future__ import annotations

import sys

from fasterai.study.command import main

sys.exit(main())
