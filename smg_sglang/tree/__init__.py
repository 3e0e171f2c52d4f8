"""Page keys and the radix tree over them: books only, no I/O, numpy only."""
