"""`python -m scconv_jax`: see `scconv_jax.cli`."""

import sys

from scconv_jax.cli import main

sys.exit(main())
