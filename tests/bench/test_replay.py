"""A trace becomes prompts that share what its ids share, sent at its times."""

import asyncio
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.replay import summary as summaries
from bench.replay.__main__ import in_a_sentence, main, named
from bench.replay.asks import Ask, Selection, asks, fitting_block, infinite_hits, prompt, select
from bench.replay.run import replay
from bench.replay.words import RESERVED, Words, plain_ids, words_of
from smg_sglang.trace import Request
from tests.bench.fake_server import FakeServer

WORDS = Words(tuple(range(100, 1100)))


def request(number=0, blocks=(1, 2), block_tokens=16, tokens=30, *, output=5, at=0.0, session=None):
    ids = np.array(blocks, np.int64)
    return Request(number, at, ids, block_tokens, tokens, output, session)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 20))
def test_prompts_share_tokens_exactly_as_far_as_they_share_ids(blocks, block_tokens):
    size = len(blocks) * block_tokens
    first = prompt(request(0, blocks, block_tokens, size), WORDS)
    changed = [*blocks[:-1], 9]
    other = prompt(request(1, changed, block_tokens, size), WORDS)
    assert len(first) == size
    assert first == prompt(request(2, blocks, block_tokens, size), WORDS)
    shared = (len(blocks) - 1) * block_tokens
    assert first[:shared] == other[:shared]


def test_a_block_begins_alike_however_much_of_it_there_is():
    assert WORDS.of(7, 40)[:5] == WORDS.of(7, 5)
    assert WORDS.of(7, 40) != WORDS.of(8, 40)


def test_tokens_that_no_id_covers_are_the_requests_own():
    a, b = (prompt(request(number, (1,), 16, 20), WORDS) for number in (0, 1))
    assert a[:16] == b[:16] and a[16:] != b[16:]


def test_warm_up_has_words_that_no_prompt_has():
    assert len(WORDS.for_warm_up) == RESERVED
    said = {token for block in range(500) for token in WORDS.of(block, 64)}
    assert not said & set(WORDS.for_warm_up)


def test_words_are_whole_tokens_of_the_tokenizer(demo_model):
    from tokenizers import Tokenizer

    words = words_of(demo_model)
    tokens = words.of("block", 500)
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    assert tuple(tokenizer.encode(words.text(tokens)).ids) == tokens


def test_without_a_tokenizer_only_ids_can_be_sent(tmp_path):
    words = words_of(tmp_path)
    assert words == plain_ids()
    with pytest.raises(ValueError, match="token ids"):
        words.text([1])


def test_times_are_the_traces_over_the_speed_from_0():
    sent = asks([request(at=5.0), request(1, at=9.0)], WORDS, Selection(speed=2.0))
    assert [ask.at_s for ask in sent] == [0.0, 2.0]


def test_contexts_are_made_to_fit():
    long = [request(blocks=range(1000), block_tokens=64, tokens=64_000)]
    assert fitting_block(long, 8192) == 4
    assert fitting_block(long, 1_000_000) == 16
    assert fitting_block([request(block_tokens=1)], 8192) == 0


def test_a_selection_drops_what_does_not_fit(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {
            "timestamp": i,
            "input_length": 512 * n,
            "output_length": 9,
            "hash_ids": list(range(n)),
        }
        for i, n in enumerate((2, 600, 3))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen, dropped = select(path, Selection(block_tokens=16))
    assert dropped == 1
    assert [r.number for r in chosen] == [0, 2]
    assert chosen[0].input_tokens == 32


def test_only_the_first_sessions_are_taken(tmp_path):
    call = {"t": 0.0, "type": "n", "in": 64, "out": 3, "hash_ids": [1]}
    for name in "abc":
        document = {"id": name, "block_size": 64, "hash_id_scope": "local", "requests": [call]}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    chosen, _ = select(tmp_path, Selection(sessions=2))
    assert len(chosen) == 2


def test_an_infinite_cache_has_what_was_asked_before():
    sent = asks([request(0), request(1, (1, 3), 16, 32)], WORDS, Selection())
    assert infinite_hits(sent, 16) == [0, 16]


def test_servers_have_names_or_are_their_own():
    assert named(["a=http://x:1/", "http://y:2"]) == {"a": "http://x:1", "http://y:2": "http://y:2"}


def replayed(server, sent, **options):
    with server.running() as url:
        return asyncio.run(replay(url, sent, **options))


def ask(number=0, at=0.0, prompt=(1, 2, 3, 4)):
    return Ask(number, at, tuple(prompt), 2)


def test_an_open_loop_does_not_wait_for_answers():
    server = FakeServer(delay_s=0.2)
    began = time.perf_counter()
    outcomes, _ = replayed(server, [ask(i, at=0.01 * i) for i in range(5)])
    assert server.most == 5 and time.perf_counter() - began < 1.5
    assert all(outcome.late_s < 0.2 for outcome in outcomes)


def test_one_in_flight_keeps_the_order():
    server = FakeServer(delay_s=0.01)
    outcomes, _ = replayed(server, [ask(i, prompt=(i, 2, 3, 4)) for i in range(4)], in_flight=1)
    assert server.most == 1
    assert [body["input_ids"][0] for body in server.bodies] == [0, 1, 2, 3]
    assert [outcome.ask.number for outcome in outcomes] == [0, 1, 2, 3]


def test_a_failed_request_is_counted_and_is_in_no_other_figure():
    outcomes, seconds = replayed(FakeServer(), [ask(0), ask(1, prompt=(1,))])
    found = summaries.summary(outcomes, seconds, [4, 0])
    assert (found["requests"], found["failed"]) == (1, 1)
    assert found["hit_share"] == {"device": 0.25, "host": 0.5}
    assert found["of_infinite"] == 0.75
    assert "500" in found["errors"][0]


def test_text_is_sent_as_text():
    server = FakeServer()
    replayed(server, [ask()], text=lambda tokens: " a b")
    assert server.bodies[0]["text"] == " a b" and "input_ids" not in server.bodies[0]


def test_figures_are_for_stock_and_ours_only():
    outcomes, seconds = replayed(FakeServer(), [ask()])
    one = summaries.summary(outcomes, seconds, [4])
    assert summaries.figures("t", {"http://x": one}) == []
    rows = summaries.figures("t", {"stock": one, "smg": one})
    assert {row["workload"] for row in rows} == {"t"}
    json.dumps(rows)


def test_a_figure_that_was_not_measured_is_none_and_not_0():
    outcomes, seconds = replayed(FakeServer(), [Ask(0, 0.0, (1, 2, 3, 4), 1)])
    one = summaries.summary(outcomes, seconds, [0])
    rows = {row["what"]: row for row in summaries.figures("t", {"stock": one, "smg": one})}
    for what in ("ITL p50", "hits, of an infinite cache's"):
        assert (rows[what]["baseline"], rows[what]["ours"]) == (None, None)


def mooncake_file(path, blocks=((1,), (1, 2), (3,))):
    rows = [
        {"timestamp": 10 * i, "input_length": 512 * len(b), "output_length": 70, "hash_ids": b}
        for i, b in enumerate(blocks)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_any_server_is_replayed_to_by_its_url(tmp_path, demo_model, capsys):
    trace, out = mooncake_file(tmp_path / "trace.jsonl"), tmp_path / "out" / "replay.json"
    server = FakeServer(demo_model)
    with server.running() as url:
        assert main([str(trace), "--url", f"mine={url}", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    mine = found["subjects"]["mine"]
    assert (mine["requests"], mine["prompt_tokens"]) == (3, 64)
    assert mine["prompt_tokens_unplanned"] == 0, "words were sent, one token each"
    assert found["trace"]["infinite_hit_share"] == 0.25
    assert found["figures"] == [] and out.with_suffix(".png").stat().st_size > 0
    assert server.flushed == 0 and len(server.bodies) == 3 + 3, "three to warm up"
    told = capsys.readouterr().out
    assert "mine" in told and "keeps its caches" in told
    assert found["trace"]["dropped"] == 0 and "dropped" not in found["title"] + told


def test_a_server_that_runs_is_flushed_if_that_is_asked_for(tmp_path, capsys):
    trace, out = mooncake_file(tmp_path / "trace.jsonl"), tmp_path / "replay.json"
    server = FakeServer()
    with server.running() as url:
        assert main([str(trace), "--url", url, "--flush", "--json", str(out)]) == 0
    assert server.flushed == 1
    assert "emptying the caches" in capsys.readouterr().out


def test_what_is_dropped_is_counted(tmp_path, capsys):
    trace, out = mooncake_file(tmp_path / "trace.jsonl"), tmp_path / "replay.json"
    options = ["--json", str(out), "--context", "25", "--block-tokens", "16", "--max-answer", "4"]
    with FakeServer().running() as url:
        assert main([str(trace), "--url", url, *options]) == 0
    found = json.loads(out.read_text())
    assert (found["trace"]["requests"], found["trace"]["dropped"]) == (2, 1)
    assert found["title"].endswith(", 1 dropped (longer than 25 tokens)")
    assert "1 dropped: longer than --context 25" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    ["--speed=0", "--speed=inf", "--in-flight=0", "--limit=-1", "--sessions=0", "--max-answer=0"],
)
def test_numbers_that_cannot_be_meant_are_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), option])
    assert ended.value.code == 2
    assert f"argument {option.partition('=')[0]}: must be" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("none answered\nmore"), TimeoutError()])
def test_what_ends_a_replay_is_one_sentence(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr("bench.replay.__main__.main", fail)
    with pytest.raises(SystemExit, match=r"none answered|TimeoutError") as ended:
        in_a_sentence([])
    assert "\n" not in ended.value.code


def test_a_server_whose_tokenizer_is_not_at_hand_is_sent_ids(tmp_path):
    trace, out = mooncake_file(tmp_path / "trace.jsonl"), tmp_path / "replay.json"
    server = FakeServer("somebody/elses-model")
    with server.running() as url:
        assert main([str(trace), "--url", url, "--json", str(out)]) == 0
    assert all("input_ids" in body for body in server.bodies)


def test_a_trace_of_which_nothing_fits_says_what_to_do(tmp_path):
    trace = mooncake_file(tmp_path / "trace.jsonl")
    with FakeServer().running() as url, pytest.raises(SystemExit, match="3 dropped: see --context"):
        main([str(trace), "--url", url, "--context", "1"])
