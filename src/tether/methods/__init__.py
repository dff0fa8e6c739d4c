"""Front doors: each puts the parts of one method together."""
