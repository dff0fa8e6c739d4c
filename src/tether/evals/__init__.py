"""Win rate, intervals, strengths, best-of-n, reward-model accuracy, diversity."""
