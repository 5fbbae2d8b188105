"""The inference form of networks and layers: equal outputs from fewer and larger operations.

    fuse.py     fuse: checks, and the fused module
    plan.py     which layer takes which form, found by tracing the network once
    winograd.py  F(4×4, 3×3), the form of 3×3 convolutions on CPU
    forms.py    the forms: of a convolution with its norm, of a norm alone, of a CRU

docs/performance.md measures what each form gains.
"""
