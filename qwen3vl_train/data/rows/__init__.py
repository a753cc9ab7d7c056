"""Any row -> a checked `Sample`."""
