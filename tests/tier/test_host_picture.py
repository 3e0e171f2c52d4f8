"""What routers are told of host memory is what is there, of what the worker knows the tokens of."""

from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.tier.host_picture import HostPicture


def key(name):
    return name.to_bytes(8, "big", signed=True) + b"\7" * 8


def keys(*names):
    return b"".join(map(key, names))


def test_a_page_is_told_when_it_comes_and_when_it_goes():
    picture = HostPicture()
    assert picture.on_device(1, "one") is None
    assert list(picture.change(False, [(True, keys(1))])) == [(1, "one")]
    assert list(picture.change(False, [(True, keys(1))])) == []
    assert list(picture.change(False, [(False, keys(1))])) == [(1, None)]
    assert list(picture.change(False, [(False, keys(1))])) == []


def test_a_page_of_unknown_tokens_is_told_when_they_are_known():
    picture = HostPicture()
    assert list(picture.change(True, [(True, keys(-5, 6))])) == []
    assert picture.on_device(-5, "block") == "block"
    assert picture.on_device(-5, "block") is None


def test_a_page_that_left_the_device_stays_known_as_long_as_host_memory_has_it():
    picture = HostPicture()
    picture.on_device(1, "one")
    list(picture.change(False, [(True, keys(1))]))
    picture.off_device(1)
    gone_and_back = picture.change(False, [(False, keys(1)), (True, keys(1))])
    assert list(gone_and_back) == [(1, None), (1, "one")]


def test_a_page_that_left_the_device_before_its_copy_was_heard_of_is_told():
    picture = HostPicture()
    picture.on_device(2, "two")
    picture.off_device(2)
    assert list(picture.change(False, [(True, keys(2))])) == [(2, "two")]


def test_what_is_nowhere_is_forgotten_in_the_end():
    picture = HostPicture(kept=2)
    for name in (1, 2, 3):
        picture.on_device(name, f"b{name}")
        picture.off_device(name)
    list(picture.change(False, [(True, keys(2)), (False, keys(2))]))
    picture.on_device(4, "b4")
    picture.off_device(4)
    assert len(picture._blocks) == 2
    assert list(picture.change(False, [(True, keys(1, 2, 3, 4))])) == [(2, "b2"), (4, "b4")]


def test_all_that_is_there_takes_the_place_of_what_was():
    picture = HostPicture()
    for name in (1, 2, 3):
        picture.on_device(name, f"b{name}")
    list(picture.change(False, [(True, keys(1, 2))]))
    assert sorted(picture.change(True, [(True, keys(2, 3))])) == [(1, None), (3, "b3")]
    assert picture.told == {2, 3}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["on", "off", "come", "go", "whole", "clear"]), st.integers(-3, 3)
        ),
        max_size=80,
    )
)
def test_whoever_listens_knows_what_is_there_and_known(steps):
    picture, heard = HostPicture(), set()
    held, device, known = set(), set(), set()

    def hear(events):
        for name, block in events:
            assert (name in heard) == (block is None)
            assert block in (None, f"b{name}")
            heard.symmetric_difference_update({name})

    for step, name in steps:
        if step == "on":
            device.add(name)
            known.add(name)
            block = picture.on_device(name, f"b{name}")
            hear([(name, block)] if block is not None else [])
        elif step == "off":
            device.discard(name)
            picture.off_device(name)
        elif step == "come":
            held.add(name)
            hear(picture.change(False, [(True, key(name))]))
        elif step == "go":
            held.discard(name)
            hear(picture.change(False, [(False, key(name))]))
        elif step == "whole":
            held = {n for n in held if n != name} | {name + 1}
            hear(picture.change(True, [(True, keys(*sorted(held)))]))
        else:
            held, device, known = set(), set(), set()
            heard.clear()
            picture.clear()
        assert heard == picture.told == held & known
