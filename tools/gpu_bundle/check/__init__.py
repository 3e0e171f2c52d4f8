"""What a GPU machine is asked in one short run: steps with limits, a table that grows."""
