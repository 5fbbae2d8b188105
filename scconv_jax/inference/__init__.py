"""Trained networks in use: class names and preparation of images (`run.py`), compiler options, the fused form."""
