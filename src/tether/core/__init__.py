"""What every room speaks. Imports nothing of ours, and only torch and the standard library."""
