from smg_sglang.config import OPTIONS
from tools import flag_table


def test_the_readme_has_the_flags_as_they_are_declared():
    text = flag_table.README.read_text(encoding="utf-8")
    assert flag_table.with_table(text) == text, "run `make readme`"
    assert all(f"`{option.flag}" in text for option in OPTIONS.values())


def test_only_what_stands_between_the_marks_is_written():
    text = f"before\n{flag_table.BEGIN}\nstale\n{flag_table.END}\nafter\n"
    written = flag_table.with_table(text)
    assert written.startswith("before\n") and written.endswith("\nafter\n")
    assert "stale" not in written
