"""One session of checks and measurements on a real GPU."""
