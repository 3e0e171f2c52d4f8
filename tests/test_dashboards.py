"""The dashboard and the alerts speak PromQL, name series that we publish, and leave none out."""

import pytest

from smg_sglang.engine.split.metrics import _SERIES as SPLIT
from smg_sglang.metrics import _SERIES
from tests.dashboards import expressions, panels, rules, selectors

#: Histograms, by their labels besides those of all series.
HISTOGRAMS = {"smg:lookup_seconds": {"le"}, "smg:phase_seconds": {"le", "stage"}}
EVERYWHERE = {"model_name", "tp_rank", "instance"}


def exported() -> dict[str, set[str]]:
    """Labels by the name a scrape shows."""
    names = {f"{name}_bucket": labels for name, labels in HISTOGRAMS.items()}
    for name, (kind, _, label) in (_SERIES | SPLIT).items():
        names[f"{name}_total" if kind == "counter" else name] = {label} if label else set()
    return names


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_an_expression_names_series_and_labels_that_are_published(where, expression):
    named = selectors(expression)
    assert named
    for selector in named:
        assert selector.name in exported(), where
        conditions = {matcher.name for matcher in selector.matchers.matchers}
        assert conditions <= exported()[selector.name] | EVERYWHERE, where


def test_every_series_is_shown():
    shown = {each.name for _, expression in expressions() for each in selectors(expression)}
    assert shown == set(exported())


def test_panels_lie_beside_each_other():
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_an_alert_says_who_and_how_bad():
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert "$labels.instance" in rule["annotations"]["summary"]
