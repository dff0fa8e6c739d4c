"""One process each: what is timed, and the machine's ceiling. They are asked in JSON lines."""
