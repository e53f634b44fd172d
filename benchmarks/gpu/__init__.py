"""What a GPU shows: bits, speed and memory at the models' true sizes, without a checkpoint (`make gpu`)."""
