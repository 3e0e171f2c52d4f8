"""Writes the README's table of flags from their declarations; part of `make readme`."""

from pathlib import Path

from smg_sglang.config.flags import table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"


def with_table(text: str) -> str:
    """The text with the table as it is declared between the two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *table(), END]) + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
