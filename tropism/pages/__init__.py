"""Pages about runs, each one HTML file that needs nothing else: a run's report, and several runs compared."""
