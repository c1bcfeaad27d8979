"""Side-by-side figures: ours, the rivals at their best, and what the machine could do."""
