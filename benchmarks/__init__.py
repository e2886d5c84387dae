"""Benchmarks of penstock against the bare back ends and against Prefect; see README.md."""
