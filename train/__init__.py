"""The trainer: `python -m train.main`. A program run from a checkout, not part of the installed library."""
