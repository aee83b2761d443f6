"""``python -m bullpen`` is ``bullpen``."""

import sys

from bullpen.cli import main

sys.exit(main())
