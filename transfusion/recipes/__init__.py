"""Users of the library like any other: digits, emoji, the paper's models, and the studies."""
