"""Reports of the quickstart."""
