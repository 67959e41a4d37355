"""What a run did and cost: statistics, and the state of the machine that it ran on."""
