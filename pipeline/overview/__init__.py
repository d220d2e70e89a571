"""One look at a project: what is fresh, what runs, what is registered, and what is wrong with its surroundings."""
