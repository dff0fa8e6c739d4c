"""Win rate, intervals, reward-model accuracy, diversity."""
