"""YAML and ``key.path=value`` to frozen objects; an unknown key is an error with the nearest name."""
