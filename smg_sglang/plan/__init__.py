"""What a token costs on a box, wherever its context lies: `python -m smg_sglang plan`."""
