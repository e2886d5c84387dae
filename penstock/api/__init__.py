"""Who remembers and shows: the store of runs, how events get into it, what is read from it."""
