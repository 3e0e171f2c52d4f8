"""A dashboard of what a real server exports."""

from prometheus_client.parser import text_string_to_metric_families

from smg_sglang.engine.split.metrics import _SERIES as SPLIT
from tests.dashboards import chooses, expressions, selectors
from tests.e2e.conftest import PROMPTS, eventually, metric


def scraped(server):
    """Labels of each sample, by its name."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def of_a_split(name):
    return name == "smg:phase_seconds_bucket" or name.removesuffix("_total") in SPLIT


def test_every_expression_finds_what_it_names(server):
    for prompt in PROMPTS[:3]:
        server.generate(prompt, 1)
    eventually(lambda: metric(server, "smg:prompt_tokens_total"), "no metrics were published")
    exported = scraped(server)
    missing = [
        (where, selector.name)
        for where, expression in expressions()
        for selector in selectors(expression)
        if not of_a_split(selector.name)
        if not any(chooses(selector, labels) for labels in exported.get(selector.name, ()))
    ]
    assert missing == []
