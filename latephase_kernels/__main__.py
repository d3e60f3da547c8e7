"""`python -m latephase_kernels` is the command `latephase`."""

import sys

from .cli import main

sys.exit(main())
