"""A worker without a model: it answers SGLang's messages as a scheduler does, as told by `mode`."""

import time
from array import array

import msgspec
import zmq
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    ShutdownReq,
    TokenizedGenerateReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams

#: A prompt whose first token is this is answered with one token, and then nothing more.
ENDLESS = 7
#: One that begins with this is not answered at all.
SILENT = 8
#: Time a fake takes for each prompt token, in seconds, when the prompt begins with this.
SLOW, SLOW_S = 9, 1e-4


def request(rid, tokens, max_new_tokens=4, **fields):
    return TokenizedGenerateReqInput(
        rid=rid,
        input_text=None,
        input_ids=array("q", tokens),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(max_new_tokens=max_new_tokens),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=True,
        **fields,
    )


def output(rid, tokens, reason):
    fields = {
        field.name: None
        for field in msgspec.structs.fields(BatchTokenIDOutput)
        if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
    }
    fields |= {
        "rids": [rid],
        "finished_reasons": [reason],
        "decoded_texts": [""],
        "decode_ids": [array("q", range(tokens))],
        "read_offsets": [0],
        "output_ids": [array("q", range(tokens))],
        "prompt_tokens": [1],
        "completion_tokens": [tokens],
        "cached_tokens": [0],
        "reasoning_tokens": [0],
        "skip_special_tokens": [True],
        "spaces_between_special_tokens": [True],
        "no_stop_trim": [True],
    }
    return BatchTokenIDOutput(**fields)


class Fake:
    def __init__(self, ports):
        context = zmq.Context()
        self.input = context.socket(zmq.PULL)
        self.outputs, self.answers = context.socket(zmq.PUSH), context.socket(zmq.PUSH)
        self.input.connect(ports.scheduler_input_ipc_name)
        self.outputs.connect(ports.detokenizer_ipc_name)
        self.answers.connect(ports.tokenizer_ipc_name)
        self.open = {}

    def run(self):
        while True:
            message = io_struct.sock_recv(self.input)
            match message:
                case ShutdownReq():
                    return
                case TokenizedGenerateReqInput():
                    self.generate(message)
                case AbortReq():
                    self.abort(message)
                case FlushCacheReqInput():
                    io_struct.sock_send(self.answers, FlushCacheReqOutput(success=True))
                case GetInternalStateReq():
                    state = {"open": sorted(self.open)}
                    io_struct.sock_send(
                        self.answers, GetInternalStateReqOutput(internal_state=state)
                    )

    def generate(self, message):
        kind = message.input_ids[0]
        if kind == SLOW:
            time.sleep(SLOW_S * len(message.input_ids))
        if kind == SILENT or (kind == ENDLESS and "#" not in message.rid):
            self.open[message.rid] = kind
            if kind == ENDLESS:
                io_struct.sock_send(self.outputs, output(message.rid, 1, None))
            return
        tokens = message.sampling_params.max_new_tokens
        for done in range(1, tokens + 1):
            reason = {"type": "length", "length": done} if done == tokens else None
            io_struct.sock_send(self.outputs, output(message.rid, done, reason))

    def abort(self, message):
        for rid in [rid for rid in self.open if rid.startswith(message.rid)]:
            if self.open.pop(rid) == SILENT:
                io_struct.sock_send(self.answers, AbortReq(rid=rid))
            else:
                io_struct.sock_send(self.outputs, output(rid, 1, {"type": "abort"}))


def run_fake(server_args, ports, *ranks_and_pipe):
    """In the place of `run_scheduler_process`."""
    pipe = ranks_and_pipe[-1]
    fake = Fake(ports)
    pipe.send({"max_req_input_len": 100_000, "max_total_num_tokens": 1000})
    fake.run()
