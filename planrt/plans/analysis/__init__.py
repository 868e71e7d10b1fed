"""What a plan does, told without running it: sizes, cost, dependences, and where the rows of an input go."""
