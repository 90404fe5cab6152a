"""Records: what a run leaves behind. Imports neither torch nor pandas."""
