"""Self-calibrated and reconstruction convolutions for JAX and Flax."""
