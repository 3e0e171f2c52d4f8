"""The page for 3 a.m. speaks of series, states and sentences that exist, and misses no warning."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from smg_sglang.engine.split.metrics import _SERIES as SPLIT_SERIES
from smg_sglang.metrics import _SERIES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SAID = [
    line for block in re.findall(r"```log\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]
#: Tools that a person runs and watches; the rest of the package speaks to a log.
WATCHED = {"simulate", "plan", "doctor", "trace"}
#: Ways to say something to whoever runs the server.
WAYS = {"warning", "error", "exception", "critical", "warn", "_tell", "ConfigError", "_refuse_any"}
WAYS |= {"WorkersBroken"}
ANY = "\0"


def template(node):
    """A sentence with ANY where something is put in; None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-+ #0]*[\d.]*[sdrfg]|\{\}", ANY, node.value).replace("%%", "%")
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else ANY for part in node.values]
        return "".join(parts)
    return None


@cache
def trees():
    return list(_trees())


def _trees():
    for file in sorted((ROOT / "smg_sglang").rglob("*.py")):
        if file.relative_to(ROOT / "smg_sglang").parts[0] not in WATCHED:
            yield file, ast.parse(file.read_text(encoding="utf-8"))


def name(call):
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def spoken():
    """(file, sentence) of all that is said in one of the WAYS, perhaps behind a level."""
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and name(node) in WAYS:
                said = [text for text in map(template, node.args) if text is not None]
                if said and len(re.findall("[a-z]+", said[0])) > 1:
                    yield file, said[0]


@cache
def texts():
    """All texts of a line and more than a word, however they are said."""
    found = {template(node) for _, tree in trees() for node in ast.walk(tree)} - {None}
    return [t for t in found if "\n" not in t and len(re.findall("[a-z]+", t)) > 1]


@cache
def pattern(text):
    return re.compile("(.+)".join(map(re.escape, re.split(f"{ANY}+", text))))


def says(text, line, sentences):
    """Whether `text` is what a line shows, where "..." or another sentence may be put in."""
    found = pattern(text).fullmatch(line)
    return found is not None and all(
        part == "..." or is_said(part, sentences) for part in found.groups()
    )


def is_said(line, sentences):
    return any(says(text, line, sentences) for text in sentences)


def test_every_line_of_the_page_is_said_by_the_code():
    sentences = texts()
    assert [line for line in SAID if not is_said(line, sentences)] == []


def test_every_warning_and_every_refusal_is_on_the_page():
    sentences = texts()
    missing = {
        f"{file.relative_to(ROOT)}: {text.replace(ANY, '...')}"
        for file, text in spoken()
        if not any(says(text, line, sentences) for line in SAID)
    }
    assert missing == set(), "say in docs/troubleshooting.md what to do about these"


def test_every_series_is_on_the_page_and_no_other():
    rows = {**_SERIES, **SPLIT_SERIES}
    counters = {f"{series}_total" for series, row in rows.items() if row[0] == "counter"}
    gauges = {series for series, row in rows.items() if row[0] == "gauge"}
    known = counters | gauges | {"smg:phase_seconds", "smg:lookup_seconds"}
    assert set(re.findall(r"smg:[a-z_]+", PAGE)) == known


@pytest.mark.parametrize(
    "constant", ["memory_full", "queue_full", "unavailable", "error", "closed", "hit", "miss"]
)
def test_every_reason_and_result_on_the_page_is_counted_by_the_code(constant):
    assert f"`{constant}`" in PAGE
    sources = [ast.walk(tree) for _, tree in trees()]
    assert any(getattr(node, "value", None) == constant for nodes in sources for node in nodes)


def test_every_state_on_the_page_is_shown_by_the_server():
    shown = [node.value for _, tree in trees() for node in ast.walk(tree) if _is_text(node)]
    for state in ("streams", "stream_held_tokens", "stream_promised_tokens", "host_tokens"):
        assert f"`{state}`" in PAGE
        assert state in shown


def _is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
