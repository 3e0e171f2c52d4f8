"""Storage below host memory: what both have lost is found again, with equal text, also after all
processes were stopped; and a dead storage process costs no request."""

import json
import shutil
import tempfile

import pytest

from tests.e2e.conftest import (
    NEW_TOKENS,
    PROMPTS,
    SMG,
    assert_idle_and_clean,
    details,
    eventually,
    metric,
    nothing_left_behind,
    smg_state,
)
from tools.sglang_server import running_server

#: With those that share a prefix, and one that is shorter than a page.
ASKED = [0, 1, 9, 10, 11, 15, 16]


@pytest.fixture(scope="module")
def args():
    directory = tempfile.mkdtemp(prefix="smg-s-")
    config = json.dumps({"file_storage_path": f"{directory}/pages", "max_size": "1G"})
    waits = ("--smg-storage-wait-ms", "30000")  # the box may be busy; a test is no stop-watch
    yield (*SMG, "--smg-storage", "file", "--smg-storage-config", config, *waits)
    shutil.rmtree(directory, ignore_errors=True)


def answers(server):
    return [server.generate(PROMPTS[i], NEW_TOKENS) for i in ASKED]


def ids(results):
    return [result["output_ids"] for result in results]


def stored(server, event):
    pages = smg_state(server)["storage"]["pages"]
    return pages[event] if pages else 0


def whole_pages(i):
    return (len(PROMPTS[i]) - 1) // 16 * 16


def assert_hits_of_storage(results):
    for i, result in zip(ASKED, results, strict=True):
        found = details(result)
        assert sum(found.get(tier, 0) for tier in ("device", "host", "storage")) == whole_pages(i)
    tokens = sum(details(result).get("storage", 0) for result in results)
    # All, but what the four with a shared prefix have of each other.
    assert tokens >= sum(map(whole_pages, ASKED)) - 640


def hits_storage(server):
    server.flush()
    return details(server.generate(PROMPTS[1], 1)).get("storage")


def storage_process(server):
    return next(p for p in server.processes() if p.cmdline()[2:4] == ["smg_sglang", "storage"])


@pytest.mark.timeout(600)
def test_a_box_that_restarts_starts_warm(tiny_model, reference, args):
    expected = [reference[i] for i in ASKED]
    pages = len(
        {tuple(PROMPTS[i][: (n + 1) * 16]) for i in ASKED for n in range(len(PROMPTS[i]) // 16)}
    )
    with nothing_left_behind(), running_server(tiny_model, args) as server:
        assert ids(answers(server)) == expected
        eventually(lambda: stored(server, "written") >= pages, "not written")
        server.flush()
        again = answers(server)
        assert ids(again) == expected
        assert_hits_of_storage(again)
        assert_idle_and_clean(server)

    with nothing_left_behind(), running_server(tiny_model, args) as server:
        warm = answers(server)
        assert ids(warm) == expected
        assert_hits_of_storage(warm)
        tokens = sum(details(result).get("storage", 0) for result in warm)
        eventually(
            lambda: metric(server, "smg:hit_tokens_total", tier="storage") == tokens, "metric"
        )

        storage_process(server).kill()
        server.flush()
        assert ids(answers(server)) == expected
        eventually(lambda: hits_storage(server), "it did not come back", 60)
        server.flush()
        late = answers(server)
        assert ids(late) == expected
        assert_hits_of_storage(late)
        assert_idle_and_clean(server)
