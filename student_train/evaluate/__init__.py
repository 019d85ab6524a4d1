"""How good a student is on a held-out cache, in numbers and on a page."""
