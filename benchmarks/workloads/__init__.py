"""One module per case: the plain functions it runs, and what one sample of it is."""
