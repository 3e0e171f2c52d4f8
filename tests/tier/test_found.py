from smg_sglang.tier.found import RETRY_MISS_S, FoundLeases

QUESTION = (0, 4, b"k" * 16)


class World:
    def __init__(self, max_held=8):
        self.now = 0.0
        self.released = []
        self.found = FoundLeases(self.released.append, max_held, clock=lambda: self.now)


def test_the_same_question_is_answered_from_what_is_held():
    world = World()
    world.found.put("r", QUESTION, "lease")
    assert world.found.get("r", QUESTION).lease == "lease"
    assert world.found.get("r", (1, 4, b"k" * 16)) is None


def test_a_miss_is_asked_again_after_a_while():
    world = World()
    world.found.put("r", QUESTION, None)
    assert world.found.get("r", QUESTION) is not None
    world.now += RETRY_MISS_S * 2
    assert world.found.get("r", QUESTION) is None


def test_a_new_answer_releases_the_old_one():
    world = World()
    world.found.put("r", QUESTION, "a")
    world.found.put("r", QUESTION, "b")
    assert world.released == ["a"]


def test_what_is_taken_is_not_released():
    world = World()
    world.found.put("r", QUESTION, "a")
    assert world.found.take("r") == "a"
    world.found.forget("r")
    assert world.released == []


def test_a_long_queue_lets_the_oldest_go():
    world = World(max_held=2)
    for rid in "abc":
        world.found.put(rid, QUESTION, rid)
    assert world.released == ["a"]
    world.found.clear()
    assert world.released == ["a", "b", "c"]
    assert len(world.found) == 0
