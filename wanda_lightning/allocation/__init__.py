"""How much of each matrix goes, and when."""
