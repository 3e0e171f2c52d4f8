"""Short convolutions in torch, beside a loop over tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.engine.cpu.convolutions import convolve_prompts, convolve_tokens

DIM, WIDTH = 6, 4


def naive(inputs, weight, bias, activation):
    """[dim, tokens]; the first WIDTH - 1 inputs are the state."""
    out = []
    for at in range(WIDTH - 1, inputs.shape[1]):
        value = (inputs[:, at - WIDTH + 1 : at + 1] * weight).sum(1)
        out.append(value if bias is None else value + bias)
    out = torch.stack(out, 1)
    return out * torch.sigmoid(out) if activation else out


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    activation=st.sampled_from([None, "silu"]),
    has_bias=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_prompts_and_tokens_go_on_from_their_states(lengths, seed, activation, has_bias):
    torch.manual_seed(seed)
    weight = torch.randn(DIM, WIDTH, dtype=torch.float64)
    bias = torch.randn(DIM, dtype=torch.float64) if has_bias else None
    states = torch.randn(8, DIM, WIDTH - 1, dtype=torch.float64)
    untouched = states.clone()
    slots = torch.randperm(8)[: len(lengths)]
    goes_on = torch.rand(len(lengths)) < 0.5
    x = torch.randn(DIM, sum(lengths), dtype=torch.float64)
    begins = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    before = [states[slot].clone() * float(on) for slot, on in zip(slots, goes_on, strict=True)]
    out = convolve_prompts(
        x, weight, bias, conv_states=states, query_start_loc=begins, cache_indices=slots,
        has_initial_state=goes_on, activation=activation,
    )  # fmt: skip
    token = torch.randn(len(lengths), DIM, dtype=torch.float64)
    following = convolve_tokens(token, states, weight, bias, activation, conv_state_indices=slots)
    for n in range(len(lengths)):
        mine = x[:, begins[n] : begins[n + 1]]
        inputs = torch.cat([before[n], mine, token[n].unsqueeze(1)], 1)
        want = naive(inputs, weight, bias, activation)
        torch.testing.assert_close(out[:, begins[n] : begins[n + 1]], want[:, :-1])
        torch.testing.assert_close(following[n], want[:, -1])
        torch.testing.assert_close(states[slots[n]], inputs[:, 1 - WIDTH :])
    others = [slot for slot in range(8) if slot not in slots.tolist()]
    assert torch.equal(states[others], untouched[others])


def test_padding_is_left_alone():
    states = torch.randn(2, DIM, WIDTH - 1)
    kept = states.clone()
    out = convolve_tokens(
        torch.randn(2, DIM), states, torch.randn(DIM, WIDTH),
        conv_state_indices=torch.tensor([-1, -1]),
    )  # fmt: skip
    assert torch.equal(states, kept)
    assert not out.any()
