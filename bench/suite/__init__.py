"""`make bench-all`: every benchmark, one record a run, and the documents made from the records."""
