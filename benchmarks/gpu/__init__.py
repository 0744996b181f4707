"""What `make gpu` runs on a machine with a GPU: build, self-check, tests, benchmarks, sanitizers; one JSON."""
