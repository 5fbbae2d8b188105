"""PyTorch oracles, written here from the papers and from the published checkpoints' entries: plain, slow and readable.

They decide what is right: the library's tests compare with them, and nothing here imports the library.
"""
