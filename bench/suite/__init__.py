"""`make bench-all`: every benchmark, one record a run, and the README's table from the records."""
