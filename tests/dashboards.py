"""What `dashboards/` asks of Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import yaml

FOLDER = Path(__file__).resolve().parent.parent / "dashboards"
#: What Grafana puts in, by what it might be.
GRAFANA = {"$__rate_interval": "5m", "$model": ".*"}


def panels() -> list[dict]:
    return json.loads((FOLDER / "smg.json").read_text(encoding="utf-8"))["panels"]


def rules() -> list[dict]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """(panel or alert, expression) of all there are, Grafana's variables put in."""
    for panel in panels():
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in GRAFANA.items():
                expression = expression.replace(variable, value)
            yield panel["title"], expression
    for rule in rules():
        yield rule["alert"], rule["expr"]


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """The series that an expression names; ValueError where it is no PromQL."""
    found: list[promql_parser.VectorSelector] = []

    def enter(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), enter)
    return found


def chooses(selector: promql_parser.VectorSelector, labels: dict[str, str]) -> bool:
    """Whether a selector's conditions hold for a series with these labels."""
    return all(holds(each, labels.get(each.name)) for each in selector.matchers.matchers)


def holds(matcher: promql_parser.Matcher, value: str | None) -> bool:
    """A label that a condition is on has to be there, also where PromQL takes none for ""."""
    if value is None:
        return False
    operator = matcher.op
    if operator in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.NotEqual):
        return (matcher.value == value) == (operator == promql_parser.MatchOp.Equal)
    found = re.fullmatch(matcher.value, value) is not None
    return found == (operator == promql_parser.MatchOp.Re)
