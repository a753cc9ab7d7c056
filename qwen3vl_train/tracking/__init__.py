"""Everything that a run reports: metrics, trackers, the terminal."""
