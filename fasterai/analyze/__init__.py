"""Analysis of a model: its cost, its speed, and the share of each target that can be removed.

`cost` counts (parameters, MACs, memory, file size), `latency` and `compare_latency` measure, `compare` puts several models side
by side, `sensitivity` scores a model over the sparsity of one target at a time. Each gives frozen data with `to_dict()`, a
table (`print`) and a picture (`plot()`), and leaves the model as it was.
To add a measure: a file here with a function that returns such data, its test, a line in `all.py` and in `docs/analyze.md`.
"""

import os as _os

__path__.append(_os.path.join(_os.path.dirname(__file__), "..", "moved", "analyze"))  # old import paths
