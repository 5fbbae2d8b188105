"""Side-by-side measurements; `make bench` runs them and records what they print in `benchmarks/results/`."""
