"""The folder of a run: its config, checkpoints, metrics, curves and trackers."""
