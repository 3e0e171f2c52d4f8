"""Frontend programs on a backend that answers at once: their shape, not a model's wit."""

import pytest
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import get_chat_template
from sglang.lang.choices import ChoicesDecision

from bench.programs import chat, few_shot, judge, texts, tree_of_thought
from bench.programs.__main__ import parse, programs
from bench.programs.compare import compare_outputs
from bench.programs.endpoint import Counts
from bench.programs.measure import Runs, summary


class Parrot(BaseBackend):
    """Says how long the prompt was; chooses by it, too. Keeps every prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = []

    def get_chat_template(self):
        return get_chat_template("chatml")

    def generate(self, s, sampling_params):
        self.prompts.append(s.text_)
        return f" {len(s.text_)}", {}

    def generate_stream(self, s, sampling_params):
        self.prompts.append(s.text_)
        yield from ((piece, {}) for piece in (" so", " be", " it"))

    def select(self, s, choices, temperature, choices_method):
        self.prompts.append(s.text_)
        return ChoicesDecision(choices[len(s.text_) % len(choices)], {})


@pytest.mark.parametrize("program", [few_shot.run, tree_of_thought.run, judge.run, chat.run])
def test_a_program_says_the_same_in_every_run(program):
    first, again = Parrot(), Parrot()
    assert program(first, 1) == program(again, 1)
    assert sorted(first.prompts) == sorted(again.prompts)


def test_all_records_of_a_task_share_its_examples():
    work = few_shot.arguments(tasks=2, records=3)
    assert [call["examples"] for call in work] == [work[0]["examples"], work[1]["examples"]] * 3
    assert work[0]["examples"] != work[1]["examples"]


def test_the_second_thoughts_stand_on_the_best_first_one():
    parrot = Parrot()
    tree_of_thought.run(parrot, 1)
    twice = [p for p in parrot.prompts if p.count("This plan is") == 1 and p.endswith("begins:")]
    assert len(twice) == 2 * tree_of_thought.BRANCHES
    bases = {p[: p.rindex("\nPlan")] for p in twice}
    assert len(bases) == 2, "one base a problem"


def test_every_side_of_a_judge_sees_the_essay_and_not_the_others():
    parrot = Parrot()
    judge.run(parrot, 1)
    remarks = [p for p in parrot.prompts if "Judge its" in p and "Grade" not in p]
    assert len(remarks) == 2 * 2 * len(judge.SIDES)
    assert all(p.count("Judge its") == 1 for p in remarks)


def test_all_users_have_a_first_turn_before_any_has_a_second():
    parrot = Parrot()
    answers = chat.run(parrot, 1)
    turns = [prompt.count("<|im_start|>user") for prompt in parrot.prompts]
    assert turns == sorted(turns) == [1] * 8 + [2] * 8
    assert answers == [" so be it"] * 16


def test_questions_are_made_up_where_there_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MT_BENCH", tmp_path / "nowhere.jsonl")
    assert texts.questions(None, 3) == texts.questions(None, 3)
    assert len({first for first, _ in texts.questions(None, 3)}) == 3


def test_questions_are_those_of_the_file_that_are_short(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text('{"turns": ["a", "b"]}\n{"turns": ["%s", "b"]}\n' % ("long " * 300))
    assert texts.questions(path, 5) == [("a", "b")]


def test_the_title_of_chats_says_whose_questions_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MT_BENCH", tmp_path / "question.jsonl")
    options = parse(["--only", "chat", "judge"])
    assert list(programs(options)) == ["chat, made-up questions", "judge"]
    (tmp_path / "question.jsonl").touch()
    assert list(programs(options)) == ["chat, MT-bench's questions", "judge"]
    options = parse(["--only", "chat", "--questions", "mine.jsonl"])
    assert list(programs(options)) == ["chat, questions of mine.jsonl"]


def test_outputs_are_compared_one_by_one_and_the_first_difference_is_shown():
    same = compare_outputs(["a", "b"], [["a", "b"], ["a", "b"]])
    assert same.equal and same.compared == 4 and same.example is None
    other = compare_outputs(["the river ran", "b"], [["the river rose", "b"]])
    assert other.different == 1
    assert other.example == ("the river ran", "the river rose")


def test_runs_with_different_numbers_of_outputs_are_refused():
    with pytest.raises(ValueError, match="zip"):
        compare_outputs(["a"], [["a", "b"]])


def test_shares_are_of_all_prompt_tokens():
    counts = Counts()
    meta = {"prompt_tokens": 30, "completion_tokens": 2, "cached_tokens": 16}
    counts.note(meta)
    counts.note(meta | {"cached_tokens_details": {"device": 0, "host": 16, "storage_backend": "x"}})
    assert counts.share("device") == counts.share("host") == 16 / 60


def test_a_summary_holds_ours_against_stock_in_pairs():
    row = {"seconds": 2.0, "device": 0, "host": 0, "prompt_tokens": 9, "output_tokens": 1}
    row |= {"requests": 1, "ttft_s": [0.5]}
    stock = Runs([row, row], [["a"], ["a"]])
    ours = Runs([row | {"seconds": 1.0}] * 2, [["a"], ["b"]])
    found = summary({"stock": stock, "smg": ours})
    assert found["seconds_ratio"]["ratio"] == 0.5
    assert found["ours_against_stock"]["different"] == 1
    assert found["stock_against_itself"] == {"compared": 1, "different": 0, "example": None}
