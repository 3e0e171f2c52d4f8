"""What `--attention-backend` calls ours."""

NAME = "smg"
#: `smg_cpu` is its former name.
NAMES = (NAME, "smg_cpu")
