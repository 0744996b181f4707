"""What a run of the suites says: ratios, tables, pictures, and what has moved since another run."""
