"""Who draws the responses, a file for each engine, and by which temperature and truncation."""
