"""Import this before torch: threads wait as they do in `vlmdpo`, so that a busy machine slows a
benchmark down no more than it must. See `vlmdpo.cli.main`.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
