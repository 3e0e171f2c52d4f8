"""`python -m smg_sglang COMMAND ...`; each command has its own --help."""

import sys
from importlib import import_module

USAGE = """usage: python -m smg_sglang COMMAND ... (COMMAND --help tells more)
  memory    a memory server of its own, shared by several SGLang servers
  storage   what stores that memory's pages; a memory server starts it itself
  simulate  what the server would do with a trace, without a model
  plan      what a token of a long context costs, wherever the context lies
  doctor    what this machine offers, and what is wrong with it"""

#: The module of each, imported when it is asked for: some want torch, or SGLang.
COMMANDS = {
    "memory": "smg_sglang.memory.cli",
    "storage": "smg_sglang.engine.storage.cli",
    "simulate": "smg_sglang.simulate.cli",
    "plan": "smg_sglang.plan.cli",
    "doctor": "smg_sglang.doctor.cli",
}


def main(arguments: list[str]) -> int:
    """Dispatch to a command; returns the exit code."""
    if arguments and arguments[0] in COMMANDS:
        return int(import_module(COMMANDS[arguments[0]]).main(arguments[1:]))
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
