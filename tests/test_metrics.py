"""Readings become Prometheus series, by none, one or several labels."""

from prometheus_client import REGISTRY, generate_latest

from smg_sglang.metrics import Series

TABLE = {
    "smg_test:plain": ("gauge", "One number.", None),
    "smg_test:one": ("counter", "By reason.", "reason"),
    "smg_test:two": ("counter", "By kind and outcome.", "kind outcome"),
}


def test_a_reading_is_published_by_its_labels_and_counters_only_grow():
    series = Series({"model": "m"}, TABLE)
    for times in (1, 2):
        series.publish(
            {
                "smg_test:plain": 7 * times,
                "smg_test:one": {"memory full": 2 * times},
                "smg_test:two": {"retain met": 3 * times, "demote met": 0},
            }
        )
    lines = generate_latest(REGISTRY).decode().splitlines()
    shown = {line for line in lines if line.startswith("smg_test:") and "_created" not in line}
    assert shown == {
        'smg_test:plain{model="m"} 14.0',
        'smg_test:one_total{model="m",reason="memory full"} 4.0',
        'smg_test:two_total{kind="retain",model="m",outcome="met"} 6.0',
        'smg_test:two_total{kind="demote",model="m",outcome="met"} 0.0',
    }
