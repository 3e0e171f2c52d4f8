"""The C kernel of decode attention: its source, how it is built, and how it is called."""
