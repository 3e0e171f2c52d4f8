"""Every published format becomes the same kind of request."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from smg_sglang.trace import TraceFormat, load_trace
from smg_sglang.trace.reader import sniff

from .factories import bailian, call, mooncake, published, session, write_lines, write_tar


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_mooncake_counts_milliseconds_and_blocks_of_512(tmp_path, name):
    path = write_lines(tmp_path / name, mooncake(), mooncake(1500, 512, 7, [0]))
    first, second = load_trace(path)
    assert (first.arrival_s, first.input_tokens, first.output_tokens) == (0.0, 1030, 5)
    assert first.blocks.tolist() == [0, 1, 2]
    assert (second.arrival_s, second.block_tokens, second.number) == (1.5, 512, 1)


def test_gzip_is_told_by_its_bytes_not_by_its_name(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(gzip.compress(json.dumps(mooncake()).encode()))
    assert len(load_trace(path)) == 1


def test_bailian_turns_belong_to_the_chat_of_their_first_ancestor(tmp_path):
    rows = [bailian(5), bailian(9, parent_chat_id=5), bailian(11, parent_chat_id=9), bailian(12, 3)]
    requests = load_trace(write_lines(tmp_path / "t.jsonl", *rows))
    assert [request.session for request in requests] == ["5", "5", "5", "12"]
    assert requests[0].block_tokens == 16


def test_bailian_ids_stand_for_their_block_only(tmp_path):
    rows = [bailian(1, hash_ids=[7, 8, 9]), bailian(2, hash_ids=[8, 7, 9])]
    assert len(load_trace(write_lines(tmp_path / "t.jsonl", *rows))) == 2


def test_sessions_are_merged_by_time_and_their_ids_never_meet(tmp_path):
    path = write_tar(
        tmp_path / "s.tgz",
        a=session("a", call(0.0), call(9.0, 192, [1, 2, 3])),
        b=session("b", call(4.0)),
    )
    requests = load_trace(path)
    assert [(r.number, r.arrival_s, r.session) for r in requests] == [
        (0, 0.0, "a"),
        (1, 4.0, "b"),
        (2, 9.0, "a"),
    ]
    assert requests[2].blocks[:2].tolist() == requests[0].blocks.tolist()
    assert not set(requests[1].blocks.tolist()) & set(requests[2].blocks.tolist())


def test_tokens_behind_the_last_whole_block_of_a_session_are_known_to_nobody(tmp_path):
    (request,) = load_trace(write_tar(tmp_path / "s.tgz", a=session("a", call(0.0, 130))))
    assert (request.input_tokens, request.known_tokens) == (130, 128)


def test_sessions_can_begin_one_after_another(tmp_path):
    path = write_tar(tmp_path / "s.tgz", a=session("a", call(1.0)), b=session("b", call(0.0)))
    assert [r.arrival_s for r in load_trace(path, session_gap_s=30.0)] == [1.0, 30.0]


def test_packed_members_of_an_archive_are_read_like_the_others(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name, pack in (("a.json", bytes), ("b.json.gz", gzip.compress), ("c", gzip.compress)):
            data = pack(json.dumps(session(name, call())).encode())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert [request.session for request in load_trace(path)] == ["a.json", "b.json.gz"]


def test_a_directory_and_a_single_session_are_read_like_an_archive(tmp_path):
    (tmp_path / "LICENSE").write_text("Apache-2.0")
    (tmp_path / "one.json").write_text(json.dumps(session("one", call()), indent=1))
    assert len(load_trace(tmp_path)) == len(load_trace(tmp_path / "one.json")) == 1


@pytest.mark.parametrize("field", ["tokens", "input_ids"])
def test_token_traces_need_no_timestamps(tmp_path, field):
    rows = [{field: [3, 1, 4]}, {field: [3, 1, 4, 1], "output_length": 2}]
    first, second = load_trace(write_lines(tmp_path / "t.jsonl", *rows))
    assert (first.block_tokens, first.input_tokens, first.arrival_s) == (1, 3, 0.0)
    assert (first.output_tokens, second.output_tokens) == (1, 2)


def test_the_format_can_be_given(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", bailian())
    assert sniff(path) is TraceFormat.BAILIAN
    (request,) = load_trace(path, "mooncake", block_tokens=16)
    assert request.session is None


def test_scaling_maps_blocks_and_keeps_what_is_shared(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", mooncake(), mooncake(0, 513, 2000, [0, 3]))
    first, second = load_trace(path, scale_to=16)
    # 1,030 tokens are two blocks and 6 tokens: 16 + 16 + 1.
    assert (first.block_tokens, first.input_tokens, first.output_tokens) == (16, 33, 1)
    assert (second.input_tokens, second.output_tokens) == (17, 63)
    assert first.blocks.tolist() == [0, 1, 2]


def test_the_published_conversations_are_read_whole():
    requests = load_trace(published("mooncake/conversation_trace.jsonl.gz"))
    blocks = np.concatenate([request.blocks for request in requests])
    assert (len(requests), len(blocks), len(np.unique(blocks))) == (12_031, 288_500, 182_790)


def test_the_published_conversations_fit_a_small_model_when_scaled():
    path = published("mooncake/conversation_trace.jsonl.gz")
    tokens = [request.input_tokens for request in load_trace(path, scale_to=16)]
    assert (np.median(tokens), np.percentile(tokens, 99), max(tokens)) == (216, 2_669, 3_944)


def test_the_published_agent_sessions_are_read_whole():
    requests = load_trace(published("agent_sessions/sessions.tgz"))
    assert len(requests) == 1_445
    assert len({request.session for request in requests}) == 40
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(arrivals)
