"""`python -m smg_sglang COMMAND ...`; each command has its own --help."""

import sys

USAGE = """usage: python -m smg_sglang COMMAND ... (COMMAND --help tells more)
  memory    a memory server of its own, shared by several SGLang servers
  storage   what stores that memory's pages; a memory server starts it itself
  simulate  what the server would do with a trace, without a model
  doctor    what this machine offers, and what is wrong with it"""


def main(arguments: list[str]) -> int:
    """Dispatch to a command; returns the exit code."""
    match arguments:
        case ["memory", *rest]:
            from smg_sglang.memory.cli import main as memory

            return memory(rest)
        case ["storage", *rest]:
            from smg_sglang.engine.storage.cli import main as storage

            return storage(rest)
        case ["simulate", *rest]:
            from smg_sglang.simulate.cli import main as simulate

            return simulate(rest)
        case ["doctor", *rest]:
            from smg_sglang.doctor.cli import main as doctor

            return doctor(rest)
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
