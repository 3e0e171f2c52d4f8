"""A trace that is wrong somewhere says where and why, and nothing of it is left out in silence."""

import gzip
import io
import json
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.errors import TraceError
from smg_sglang.trace import load_trace

from .factories import bailian, call, mooncake, session, write_lines, write_tar

MOONCAKE = [
    (mooncake(input_length=-5), "Expected `int` >= 1"),
    (mooncake(output_length=-1), "Expected `int` >= 0"),
    (mooncake(timestamp=-1), "Expected `float` >= 0"),
    (mooncake(hash_ids=[0, 1]), "make 3 ids, not 2"),
    (mooncake(hash_ids=[0, 1, 2, 3]), "make 3 ids, not 4"),
    (mooncake(hash_ids=[0, 2, 1]), "id 2 stands for another prefix than before"),
    (mooncake(input_length=1031), "id 2 has 7 tokens here, and had 6 before"),
    (mooncake(hash_ids=[0, 1, -2]), "Expected `int` >= 0"),
    ({**mooncake(), "hash_ids": "0, 1, 2"}, "Expected `array`, got `str`"),
    (mooncake(input_length="many"), "Expected `int`, got `str`"),
    ({"timestamp": 9, "hash_ids": [0]}, "missing required field `input_length`"),
    (mooncake(hash_ids=[0, 1, 1 << 64]), "Expected `int` <= 9223372036854775807"),
]


@pytest.mark.parametrize(("row", "reason"), MOONCAKE)
def test_a_wrong_line_is_named_with_its_reason(tmp_path, row, reason):
    path = write_lines(tmp_path / "t.jsonl", mooncake(), row)
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert caught.value.file == str(path)
    assert caught.value.where == "line 2"
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize("row", [mooncake, bailian])
def test_time_may_not_go_backwards(tmp_path, row):
    path = write_lines(tmp_path / "t.jsonl", row(timestamp=9), row(timestamp=8))
    with pytest.raises(TraceError, match="line 2: time goes backwards"):
        load_trace(path)


def test_an_empty_line_is_an_error(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(mooncake()) + "\n\n" + json.dumps(mooncake()))
    with pytest.raises(TraceError, match="line 2: the line is empty"):
        load_trace(path)


def test_a_cut_line_is_recognised_as_such(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(mooncake()) + "\n" + json.dumps(mooncake())[:-9])
    with pytest.raises(TraceError, match=r"line 2: .*was the file cut"):
        load_trace(path)


def test_a_cut_gzip_file_is_an_error(tmp_path):
    data = gzip.compress(b"".join(json.dumps(mooncake()).encode() + b"\n" for _ in range(50)))
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(data[:-20])
    with pytest.raises(TraceError, match=r"line \d+: cannot be read"):
        load_trace(path)


BAD_CALLS = [
    (call(5.0, -130), "Expected `int` >= 1"),
    (call(5.0, 130, [1]), "make 2 or 3 ids, not 1"),
    (call(5.0, 130, [2, 1]), "id 2 stands for another prefix"),
    (call(0.5), "time goes backwards"),
    ({"t": 5.0, "type": "subagent", "requests": []}, "missing required field `in`"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_CALLS)
def test_a_wrong_request_of_a_session_is_named_with_its_member(tmp_path, bad, reason):
    path = write_tar(
        tmp_path / "s.tgz", good=session("good", call(1.0)), x=session("x", call(1.0), bad)
    )
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert caught.value.where == "member x.json, request 1"
    assert reason in caught.value.reason


def test_a_cut_archive_is_an_error(tmp_path):
    calls = [call(float(t)) for t in range(500)]
    path = write_tar(tmp_path / "s.tgz", a=session("a", *calls), b=session("b", *calls))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(TraceError, match="cannot be read"):
        load_trace(path)


def test_an_archive_without_sessions_is_an_error(tmp_path):
    with pytest.raises(TraceError, match="holds no request"):
        load_trace(write_tar(tmp_path / "s.tgz"))


TOKENS = [
    ({"tokens": [1], "input_ids": [1]}, "either `tokens` or `input_ids`"),
    ({"output_length": 1}, "either `tokens` or `input_ids`"),
    ({"tokens": []}, "at least one token"),
    ({"tokens": [1], "timestamp": 4}, "some lines have a `timestamp`"),
    ({"tokens": [1, "2"]}, "Expected `int`, got `str`"),
]


@pytest.mark.parametrize(("row", "reason"), TOKENS)
def test_a_wrong_line_of_tokens_is_named(tmp_path, row, reason):
    path = write_lines(tmp_path / "t.jsonl", {"tokens": [1, 2]}, row)
    with pytest.raises(TraceError, match="line 2: ") as caught:
        load_trace(path)
    assert reason in caught.value.reason


@pytest.mark.parametrize("text", ["", "[1, 2]\n", '{"prompt": "x"}\n', "text\n"])
def test_a_file_of_no_known_format_is_refused(tmp_path, text):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError):
        load_trace(path)


def test_text_that_is_no_utf8_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"\xff": 1, "requests": [], "id": "\xff"}\n')
    with pytest.raises(TraceError, match="line 1: is no JSON object"):
        load_trace(path)
    with pytest.raises(TraceError, match="is no session"):
        load_trace(path, "agents")


def test_a_cut_member_is_named(tmp_path):
    data = gzip.compress(json.dumps(session("a", call())).encode())
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        info = tarfile.TarInfo("a.json.gz")
        info.size = len(data) - 9
        archive.addfile(info, io.BytesIO(data[:-9]))
    with pytest.raises(TraceError, match=r"member a\.json\.gz: cannot be read"):
        load_trace(tmp_path / "s.tar")


@pytest.mark.parametrize("wrong", [{"block_tokens": 0}, {"scale_to": 0}, {"block_tokens": -16}])
def test_blocks_of_no_token_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be 1 at least"):
        load_trace(write_lines(tmp_path / "t.jsonl", mooncake()), **wrong)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TraceError, match="no such file"):
        load_trace(tmp_path / "t.jsonl")


def test_what_cannot_be_scaled_or_recut_is_refused(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", {"tokens": [1, 2]})
    with pytest.raises(TraceError, match="cannot be scaled"):
        load_trace(path, scale_to=16)
    with pytest.raises(TraceError, match="says itself"):
        load_trace(path, block_tokens=16)


@given(cut=st.integers(0, 10_000))
def test_no_cut_is_overlooked(tmp_path_factory, cut):
    rows = [mooncake(timestamp=9 * i, hash_ids=[i, 10 + i, 20 + i]) for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    cut %= len(text) + 1
    path = tmp_path_factory.mktemp("cut") / "t.jsonl"
    path.write_text(text[:cut])
    complete = text[:cut].count("}")
    if cut and complete == text[:cut].count("{"):
        assert len(load_trace(path)) == complete
    else:
        with pytest.raises(TraceError):
            load_trace(path)
